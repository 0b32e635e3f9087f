"""`janus-mega data ...`: raw data to shards, and what shards and mixtures will give."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import UserError
from data_pipeline.prepare.options import OnBad, PrepareOptions
from data_pipeline.spec import Template

data_app = typer.Typer(
    help="Prepare shards, look into them, and see what a mixture will give.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Kind(Enum):
    """What raw records become."""

    text = "text"
    interleaved = "interleaved"
    t2i = "t2i"


@data_app.command()
def prepare(
    kind: Annotated[Kind, typer.Argument(help="What the records are: see docs/formats.md.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Text files, .jsonl, or directories.")],
    out: Annotated[Path, typer.Option(help="Directory to write, or to continue.")],
    text_tokenizer: Annotated[Path, typer.Option(help="sentencepiece .model, or a directory with tokenizer.json.")],
    image_tokenizer: Annotated[Path | None, typer.Option(help="Directory of the image tokenizer (t2i).")] = None,
    template: Annotated[Template, typer.Option(help="Dialogue template of questions.")] = Template.deepseek,
    samples_per_shard: Annotated[int, typer.Option(help="Records per shard; also the unit of restart.")] = 10_000,
    on_bad: Annotated[OnBad, typer.Option(help="A broken record stops the command, or is left out.")] = OnBad.error,
) -> None:
    """Write shards and their index from raw records; continues where it was interrupted."""
    from data_pipeline.prepare.interleaved import prepare_interleaved
    from data_pipeline.prepare.t2i import prepare_t2i
    from data_pipeline.prepare.text import prepare_text
    from data_pipeline.text.load import load_text_tokenizer
    from janus_mega.cli.show import prepare_lines
    from janus_mega.observe.progress import Progress

    if (kind is Kind.t2i) != (image_tokenizer is not None):
        raise UserError(
            f"data prepare {kind.value}: --image-tokenizer is for t2i, and t2i needs it; correct the options"
        )
    tokenizer = load_text_tokenizer(text_tokenizer)
    options = PrepareOptions(samples_per_shard=samples_per_shard, on_bad=on_bad)
    with Progress(f"prepare {kind.value}", 0) as progress:
        if image_tokenizer is not None:
            from janus_mega.models.vision.image_tokenizer import load_image_tokenizer

            images = load_image_tokenizer(image_tokenizer)
            report = prepare_t2i(inputs, out, tokenizer, images, options=options, progress=progress.reach)
        elif kind is Kind.text:
            report = prepare_text(inputs, out, tokenizer, options=options, progress=progress.reach)
        else:
            report = prepare_interleaved(
                inputs, out, tokenizer, template=template, options=options, progress=progress.reach
            )
    for line in prepare_lines(report):
        print(line)


@data_app.command()
def inspect(
    source: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A directory of shards.")],
    examples: Annotated[int, typer.Option(help="Samples to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell what a directory of shards holds, from its manifest and index."""
    import json

    from data_pipeline.inspection import inspect_source, inspection_lines

    found = inspect_source(source, examples)
    for line in [json.dumps(found, indent=2)] if as_json else inspection_lines(found):
        print(line)


@data_app.command()
def plan(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of a run: a path, or a name under configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values.")] = None,
    steps: Annotated[int, typer.Option(help="Steps to look at; 0 takes the whole stage.")] = 0,
    world_size: Annotated[int, typer.Option(help="Ranks that images are dealt to.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile the data plan of a run and report shares, epochs and padding; nothing is trained."""
    import dataclasses
    import json

    from data_pipeline.plan.report import describe_plan
    from data_pipeline.text.load import load_text_tokenizer
    from janus_mega.cli.show import plan_lines
    from janus_mega.config import derive
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import RunConfig
    from janus_mega.config.validate import validate_run

    config = load_config(RunConfig, file, overrides or []).config
    validate_run(config, world_size)
    report = describe_plan(
        config.data,
        load_text_tokenizer(config.data.text_tokenizer),
        global_batch_size=config.stage.global_batch_size,
        num_steps=steps or derive.last_step(config.stage),
        dp_size=derive.dp_size(config.parallel, world_size),
        micro_batch_size=config.parallel.micro_batch_size,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return
    for line in plan_lines(report):
        print(line)
