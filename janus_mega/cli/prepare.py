"""`janus-mega data prepare`: raw data to shards, in this process, in a pool of them, or as one job of an array."""

import os
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import UserError
from data_pipeline.prepare.importing import Format, ImageSide, ImportOptions, OnMissingImage
from data_pipeline.prepare.options import ONE_THREAD, OnBad, PrepareOptions, PrepareReport, Tally
from data_pipeline.spec import Template
from janus_mega.cli.grouped import GroupedCommand
from janus_mega.observe.progress import Progress

prepare_app = typer.Typer(rich_markup_mode=None)

TOKENIZERS, READING, MAKING, SHARING = "Tokenizers", "Reading the input", "Making samples", "Sharing the work"


class Kind(Enum):
    """What raw records become."""

    text = "text"
    interleaved = "interleaved"
    t2i = "t2i"


def _option(group: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group)


@prepare_app.command(cls=GroupedCommand)
def prepare(
    kind: Annotated[Kind, typer.Argument(help="What the records are: see docs/formats.md.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Files or directories, see --format.")],
    out: Annotated[Path, typer.Option(help="Directory to write, or to continue.")],
    text_tokenizer: Annotated[Path, _option(TOKENIZERS, "sentencepiece .model, or a directory with tokenizer.json.")],
    image_tokenizer: Annotated[Path | None, _option(TOKENIZERS, "Directory of the image tokenizer (t2i).")] = None,
    format: Annotated[Format, _option(READING, "How the input is laid out.")] = Format.auto,
    images: Annotated[
        list[Path] | None, _option(READING, "Where pictures lie that records only name; may be repeated.")
    ] = None,
    text_column: Annotated[str, _option(READING, "Field of the text.")] = "",
    caption_column: Annotated[str, _option(READING, "Field of the caption.")] = "",
    image_column: Annotated[str, _option(READING, "Field of the picture.")] = "",
    keep: Annotated[list[str] | None, _option(READING, "Numeric field kept for masks; may be repeated.")] = None,
    class_names: Annotated[Path | None, _option(READING, "Names of class folders: JSON, or lines.")] = None,
    image_side: Annotated[
        ImageSide, _option(READING, "Picture before or after its sentence (mmc4).")
    ] = ImageSide.before,
    on_missing_image: Annotated[
        OnMissingImage, _option(READING, "Without its picture a document goes, or loses it alone.")
    ] = OnMissingImage.reject,
    on_bad: Annotated[OnBad, _option(READING, "A broken record stops the command, or is left out.")] = OnBad.error,
    template: Annotated[Template, _option(MAKING, "Dialogue template of questions.")] = Template.deepseek,
    max_document_tokens: Annotated[int, _option(MAKING, "Cut longer texts (text); 0 keeps them whole.")] = 0,
    crops: Annotated[int, _option(MAKING, "Crops stored per picture (t2i); the first is the middle.")] = 1,
    flips: Annotated[bool, _option(MAKING, "Mirror some of the further crops (t2i).", "--flips")] = False,
    samples_per_shard: Annotated[int, _option(MAKING, "Records per shard; also the unit of restart.")] = 10_000,
    workers: Annotated[int, _option(SHARING, "Processes on this machine, one thread each.")] = 1,
    tasks: Annotated[int, _option(SHARING, "Jobs that share the work, of a SLURM array say.")] = 1,
    task: Annotated[int | None, _option(SHARING, "Which of them this is, from 0; all write to one --out.")] = None,
) -> None:
    """Write shards and their index from raw records; continues where it was interrupted."""
    if task is None and tasks > 1:
        raise UserError(f"data prepare --tasks {tasks} needs --task, 0 to {tasks - 1}: which of them this one is")
    importing = ImportOptions(
        format=format,
        images=tuple(images or ()),
        text_column=text_column,
        caption_column=caption_column,
        image_column=image_column,
        keep_columns=tuple(keep or ()),
        class_names=class_names,
        on_missing_image=on_missing_image,
        image_side=image_side,
    )
    options = PrepareOptions(
        samples_per_shard=samples_per_shard,
        crops=crops,
        flips=flips,
        max_document_tokens=max_document_tokens,
        on_bad=on_bad,
        importing=importing,
        workers=workers,
        jobs=tasks,
        job=task or 0,
    )
    _run(kind, inputs, out, (text_tokenizer, image_tokenizer, template), options)


def _run(
    kind: Kind, inputs: list[Path], out: Path, makers: tuple[Path, Path | None, Template], options: PrepareOptions
) -> None:
    """Prepares with a progress bar and prints what came of it."""
    if (kind is Kind.t2i) != (makers[1] is not None):
        raise UserError(
            f"data prepare {kind.value}: --image-tokenizer is for t2i, and t2i needs it; correct the options"
        )
    os.environ.update(ONE_THREAD)  # before anything loads torch: the bytes must not depend on the number of cores
    from janus_mega.cli.show import prepare_lines

    try:
        with Progress(f"prepare {kind.value}", 0) as bar:
            report = _prepare(kind, inputs, out, makers, options, shown_on(bar))
    except KeyboardInterrupt:
        raise UserError(f"{out}: interrupted; the same command continues after the last finished shard") from None
    for line in prepare_lines(report):
        print(line)


def _prepare(
    kind: Kind,
    inputs: list[Path],
    out: Path,
    makers: tuple[Path, Path | None, Template],
    options: PrepareOptions,
    progress: Callable[[Tally], None],
) -> PrepareReport:
    """Calls the prepare function of the kind."""
    from data_pipeline.prepare.interleaved import prepare_interleaved
    from data_pipeline.prepare.t2i import prepare_t2i
    from data_pipeline.prepare.text import prepare_text
    from data_pipeline.text.load import load_text_tokenizer

    text_tokenizer, image_tokenizer, template = makers
    tokenizer = load_text_tokenizer(text_tokenizer)
    if image_tokenizer is not None:
        from janus_mega.models.vision.image_tokenizer import encoding_device, load_image_tokenizer

        # Workers load it again, each onto its own device; then this process only needs to know what it is.
        device = encoding_device() if options.workers == 1 else None
        encoder = load_image_tokenizer(image_tokenizer, device)
        return prepare_t2i(inputs, out, tokenizer, encoder, options=options, progress=progress)
    if kind is Kind.text:
        return prepare_text(inputs, out, tokenizer, options=options, progress=progress)
    return prepare_interleaved(inputs, out, tokenizer, template=template, options=options, progress=progress)


def shown_on(bar: Progress) -> Callable[[Tally], None]:
    """A progress callback that shows speed and rejects beside the bar."""
    from janus_mega.cli.show import tally_note

    began_s: list[float] = []

    def show(tally: Tally) -> None:
        if not began_s:
            began_s.append(time.monotonic())
            bar.resume(tally.kept, tally.records)
        bar.reach(tally.done, tally.records, tally_note(tally.made, time.monotonic() - began_s[0]))

    return show
