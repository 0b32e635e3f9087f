"""`janus-mega data preview`: one HTML page of packed rows, samples, and pictures beside what their ids decode to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UserError
from data_pipeline.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from data_pipeline.explain.blame import Layout
    from data_pipeline.explain.preview import PictureDecoder
    from janus_mega.cli.run_data import RunData

_ImageDirs = Annotated[
    list[Path] | None, typer.Option(help="Shards of documents with the original pictures; may be repeated.")
]


preview_app = typer.Typer(rich_markup_mode=None)


@preview_app.command()
def preview(
    what: Annotated[str, typer.Argument(metavar="CONFIG|DIRECTORY", help="A run (YAML or directory), or shards.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("preview.html"),
    step: Annotated[int, typer.Option(help="Step whose rows are shown, from 1.")] = 1,
    rows: Annotated[int, typer.Option(help="Rows of it to show; 0 shows all.")] = 12,
    samples: Annotated[int, typer.Option(help="Samples of each source to show.")] = 6,
    world_size: Annotated[int, typer.Option(help="Ranks of the run; tells who has which row.")] = 0,
    text_tokenizer: Annotated[Path | None, typer.Option(help="Of shards; a run names its own.")] = None,
    image_tokenizer: Annotated[Path | None, typer.Option(help="Turns image ids into pictures.")] = None,
    images: _ImageDirs = None,
) -> None:
    """Write a self-contained HTML page: rows as they will be packed, samples, pictures beside their decoded ids."""
    for name, value, least in (("--step", step, 1), ("--rows", rows, 0), ("--samples", samples, 0)):
        if value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    if (Path(what) / MANIFEST_NAME).is_file():
        _write_source_page(Path(what), out, samples or 1, (text_tokenizer, image_tokenizer), images or [])
    else:
        from data_pipeline.explain.blame import Layout
        from janus_mega.cli.run_data import open_run_data

        run = open_run_data(what, overrides or [], step=step)
        layout = run.layout(world_size) if world_size else Layout()
        first = (step - 1) * run.data.plan.global_batch_size
        shown = range(first, first + min(rows or run.data.plan.global_batch_size, run.data.plan.global_batch_size))
        write_batch_page(run, step, layout, out, Shown(shown, samples, image_tokenizer, images or []))
    print(out)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a page of a batch shows."""

    rows: Sequence[int] = ()
    """Row numbers of the plan; none shows all rows of the step."""
    samples: int = 0
    """Samples of every source beside them."""
    image_tokenizer: Path | None = None
    """Turns image ids into pictures, instead of the run's own."""
    images: Sequence[Path] = ()
    """Shards of documents with the original pictures."""


def write_batch_page(run: "RunData", step: int, layout: "Layout", out: str | Path, shown: Shown) -> None:
    """Writes the page of some rows of a step, and samples of every source.

    Raises:
        UserError: There is no such step, or something cannot be read.
    """
    from data_pipeline.explain.inspection import inspect_source
    from data_pipeline.explain.originals import open_originals
    from data_pipeline.explain.preview import Viewer, view_rows, view_samples
    from janus_mega.report.data_page import add_source, budget_note, rows_page

    named = run.config.data.image_tokenizer
    decoder = _decoder(shown.image_tokenizer or (Path(named) if named and Path(named).is_dir() else None))
    viewer = Viewer(run.data.builder.tokenizer, decoder, open_originals(shown.images, run.data.sources))
    views = view_rows(run.data, step, viewer, layout, list(shown.rows))
    plan = run.data.plan
    subtitle = (
        f"{run.config.name}: step {step}, {len(views)} of {plan.global_batch_size} rows of {plan.seq_len} positions, "
        f"plan {plan.digest[:16]}"
    )
    shows_ranks = layout.dp_size * layout.micro_batch_size > 1
    page, budget = rows_page(f"Data of {run.config.name}", subtitle, views, shows_ranks=shows_ranks)
    if shown.samples:
        for planned, source in zip(plan.sources, run.data.sources, strict=True):
            views_of_source = view_samples(source, viewer, shown.samples)
            add_source(page, budget, inspect_source(source.path, 0), views_of_source, f"Source {planned.name}")
    page.sections.append(budget_note(budget))
    page.write(Path(out))


def _write_source_page(
    path: Path, out: Path, samples: int, tokenizers: tuple[Path | None, Path | None], images: Sequence[Path]
) -> None:
    from data_pipeline.explain.inspection import inspect_source
    from data_pipeline.explain.originals import open_originals
    from data_pipeline.explain.preview import Viewer, view_samples
    from data_pipeline.manifest import open_source
    from data_pipeline.text.load import load_text_tokenizer
    from janus_mega.report.data_page import STYLE, Budget, add_source, budget_note
    from janus_mega.report.page import Page

    source = open_source(path)
    text = load_text_tokenizer(tokenizers[0]) if tokenizers[0] else None
    viewer = Viewer(text, _decoder(tokenizers[1]), open_originals(images))
    page = Page(f"Data of {path.name}", f"{path}, manifest {source.digest[:16]}", style=STYLE)
    budget = Budget()
    views = view_samples(source, viewer, samples)
    add_source(page, budget, inspect_source(path, 0), views, "What it holds")
    page.sections.append(budget_note(budget))
    page.write(out)


def _decoder(path: Path | None) -> "PictureDecoder | None":
    if path is None:
        return None
    from janus_mega.models.vision.image_tokenizer import load_image_tokenizer

    return load_image_tokenizer(path)
