"""`janus-mega data plan`: what a run's data will be, before anything runs; and what two plans have different."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.plan.advise import SeqLenAdvice
    from data_pipeline.plan.report import PlanReport, SourceReport
    from janus_mega.cli.run_data import RunData
    from janus_mega.config.schema import RunConfig

DIFFERENT_CODE = 1
"""Exit code of `data plan diff` where the plans differ, as `diff` has it."""
STEPS_COMPILED = 2000
"""Unless --steps says otherwise: half a minute at 512 rows of 4096 tokens."""
_EPOCHS_PRINTED = 8
_NAME_WIDTH = 24


plan_app = typer.Typer(rich_markup_mode=None)


@plan_app.command()
def plan(
    file: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|diff A B",
            help="YAML of a run (a path, or a name under configs/), or a run directory. `diff A B`: tell what differs "
            "between the plans of two such, or of plan.json files; the exit code is 1 if anything does.",
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values.")] = None,
    steps: Annotated[
        int, typer.Option(help="Steps to compile; the rest of the stage is projected. 0 compiles all.")
    ] = STEPS_COMPILED,
    world_size: Annotated[int, typer.Option(help="Ranks that images are dealt to.")] = 1,
    advise_seq_len: Annotated[
        bool, typer.Option("--advise-seq-len", help="Tell the padding at other row lengths instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compile the data plan of a run: shares, epochs, padding, what runs out when. Nothing is trained.

    Also refuses what could not be trained: a source too small for its share under its max_epochs.
    """
    if steps < 0:
        raise UserError(f"--steps {steps} must be 0 (all) or more")
    if file == "diff":
        _diff(overrides or [], as_json)
    elif advise_seq_len:
        _advise(file, overrides or [], as_json)
    else:
        _report(file, overrides or [], steps, world_size, as_json)


def _report(file: str, overrides: Sequence[str], steps: int, world_size: int, as_json: bool) -> None:
    import dataclasses
    import json

    from data_pipeline.plan.report import report_plan
    from data_pipeline.plan.supply import check_supply
    from janus_mega.config import derive
    from janus_mega.observe.progress import Progress

    opened = _opened(file, overrides, world_size)
    layout = opened.layout(world_size)
    num_steps = derive.last_step(opened.config.stage)
    check_supply(opened.data.plan, num_steps)
    with Progress("plan", 0) as progress:
        report = report_plan(
            opened.data.plan,
            num_steps,
            dp_size=layout.dp_size,
            micro_batch_size=layout.micro_batch_size,
            max_steps=steps,
            progress=progress.reach,
        )
    for line in [json.dumps(dataclasses.asdict(report), indent=2)] if as_json else report_lines(report):
        print(line)


def _opened(file: str, overrides: Sequence[str], world_size: int) -> "RunData":
    """The data of a run whose configuration breaks no rule; rules come first, they name everything at once."""
    from janus_mega.cli.run_data import open_run_data
    from janus_mega.config.validate import validate_run

    validate_run(_config(file, overrides), world_size)
    return open_run_data(file, overrides, step=0)


def _config(file: str, overrides: Sequence[str]) -> "RunConfig":
    """The configuration of a YAML or of a run directory."""
    from janus_mega.cli.run_data import CONFIG_FILE
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import RunConfig

    path = Path(file) / CONFIG_FILE
    return load_config(RunConfig, path if path.is_file() else file, overrides).config


def _diff(plans: Sequence[str], as_json: bool) -> None:
    import json

    from data_pipeline.plan.difference import difference
    from data_pipeline.plan.identity import digest_of

    if len(plans) != 2:
        raise UserError(f"data plan diff: {len(plans)} plans given, it takes two: YAML, plan.json or run directory")
    ours, theirs = (_identity_of(name) for name in plans)
    lines = difference(ours, theirs, ("in A", "in B"))
    digests = [digest_of(identity) for identity in (ours, theirs)]
    if as_json:
        print(json.dumps({"a": digests[0], "b": digests[1], "differences": lines}, indent=2))
    else:
        print(f"A {plans[0]}: plan {digests[0][:12]}")
        print(f"B {plans[1]}: plan {digests[1][:12]}")
        for line in lines or ["the plans are equal: every global batch is the same"]:
            print(f"  {line}")
    if lines:
        raise typer.Exit(DIFFERENT_CODE)


def _identity_of(name: str) -> dict[str, Any]:
    """The identity of a plan: from a saved one, else compiled from a configuration."""
    from data_pipeline.plan.difference import IDENTITY_FILE, load_identity
    from janus_mega.cli.run_data import open_run_data

    path = Path(name)
    if path.suffix == ".json" or (path / IDENTITY_FILE).is_file():
        return load_identity(path)
    return open_run_data(name, []).data.plan.identity


def _advise(file: str, overrides: Sequence[str], as_json: bool) -> None:
    """Opens the sources alone: the length asked for may be one that no plan exists for."""
    import dataclasses
    import json

    from data_pipeline.plan.advise import advise_seq_len
    from data_pipeline.plan.open import open_sources
    from data_pipeline.text.load import load_text_tokenizer
    from janus_mega.observe.progress import Progress

    config = _config(file, overrides)
    _, _, sources = open_sources(config.data, load_text_tokenizer(config.data.text_tokenizer))
    with Progress("row lengths", 0) as progress:
        advice = advise_seq_len(config.data, sources, config.stage.global_batch_size, progress=progress.reach)
    for line in [json.dumps(dataclasses.asdict(advice), indent=2)] if as_json else advice_lines(advice):
        print(line)


def advice_lines(advice: "SeqLenAdvice") -> Iterator[str]:
    """Yields the length asked for, the advised one, and every other that pads less than all shorter ones."""
    yield f"seq_len {advice.advised} is advised, {advice.asked} is asked for"
    yield _row("longest uncut document", f"{advice.shortest:,} tokens")
    yield ""
    yield f"{'seq_len':>10} {'padding':>9} {'documents':>10} {'images':>7}"
    least = 1.0
    for row in advice.rows:
        if row.padding_fraction < least or row.seq_len in (advice.asked, advice.advised):
            mark = (
                "  advised" if row.seq_len == advice.advised else "  asked for" if row.seq_len == advice.asked else ""
            )
            yield (
                f"{row.seq_len:>10} {row.padding_fraction:>9.3%} {row.documents_per_row:>10.2f} "
                f"{row.images_per_row:>7.2f}{mark}"
            )
        least = min(least, row.padding_fraction)


def report_lines(report: "PlanReport") -> Iterator[str]:
    """Yields what a compiled plan will do."""
    is_whole = report.measured_steps == report.num_steps
    yield f"plan {report.digest[:12]}: {report.num_steps:,} steps of {report.global_batch_size} rows x {report.seq_len}"
    if not is_whole:
        yield f"compiled: the first {report.measured_steps:,} steps; what is of the whole stage is projected from them"
    yield _row("tokens", f"{report.tokens:,} in {report.num_rows:,} rows")
    if not is_whole:
        yield _row("tokens of the stage", f"about {report.stage_tokens:,}")
    yield _row("padding", f"{report.padding_fraction:.3%}")
    yield _row("documents per row", f"{report.documents_per_row:.2f}")
    yield _row("images per row", f"{report.images_per_row:.2f}, at most {report.max_images_per_row}")
    yield _row("images, fullest rank", f"{report.rank_image_imbalance:.3f} of the mean")
    yield _row("images, fullest position", f"{report.micro_batch_image_imbalance:.3f} of the mean micro-batch")
    yield _row("task off its share", f"at most {report.max_task_error_rows:.2f} rows in a step")
    yield ""
    yield from _source_lines(report)
    ends = [line for source in report.sources for line in _epoch_lines(source, report)]
    if ends:
        yield ""
        yield "epochs end in steps"
        yield from ends
    if report.events:
        yield ""
        yield f"the mixture changes (between windows of {report.steps_per_window} steps)"
        for event in report.events:
            about = "about " if event.is_projected else ""
            subject = f"{event.source} " if event.source else "the plan "
            yield f"  after step {about}{event.after_step:,}: {subject}{event.what}"


def _source_lines(report: "PlanReport") -> Iterator[str]:
    """A line for each source; shares are of the ratio unit, and so is what a source was off at most."""
    unit = report.ratio_unit
    yield (
        f"{'share of ' + unit:<{_NAME_WIDTH}} {'task':<14} {'planned':>8} {'real':>8} {'off by':>8} {'tokens':>16} "
        f"{'epochs':>8} {'of stage':>9}"
    )
    for source in report.sources:
        yield (
            f"{source.name:<{_NAME_WIDTH}} {source.task:<14} {source.planned_share:>8.2%} "
            f"{source.realised_share:>8.2%} {source.max_off_share:>8.4g} {source.tokens:>16,} {source.epochs:>8.2f} "
            f"{source.stage_epochs:>9.2f}"
        )
        if source.samples_left_out:
            yield f"  masks leave out {source.samples_left_out:,} samples; an epoch is {source.documents_per_epoch:,}"


def _epoch_lines(source: "SourceReport", report: "PlanReport") -> Iterator[str]:
    """The steps in which epochs end; `~` where they are projected."""
    if source.epoch_ends:
        listed = source.epoch_ends[:_EPOCHS_PRINTED]
        steps = [f"{'~' if step > report.measured_steps else ''}{step:,}" for step in listed]
        more = " ..." if source.stage_epochs >= len(steps) + 1 else ""
        yield _row(source.name, f"{', '.join(steps)}{more}")


def _row(name: str, value: str) -> str:
    return f"  {name:<{_NAME_WIDTH}} {value}"
