"""`janus-mega data index`: an index for tars of others, which stay where they are."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.prepare.options import OnBad

index_app = typer.Typer(rich_markup_mode=None)


@index_app.command()
def index(
    tars: Annotated[
        list[Path], typer.Argument(metavar="TARS...", help="Tars of pictures with captions, or their directory.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write the index to, or to continue.")],
    text_tokenizer: Annotated[Path, typer.Option(help="sentencepiece .model, or a directory with tokenizer.json.")],
    on_bad: Annotated[OnBad, typer.Option(help="A broken pair stops the command, or is left out.")] = OnBad.error,
    keep: Annotated[list[str] | None, typer.Option(help="Numeric field of .json kept for masks; repeatable.")] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
) -> None:
    """Index img2dataset or open_clip tars where they lie, as a source of pictures to describe; nothing is copied."""
    from data_pipeline.prepare.foreign import IndexOptions, index_tars
    from data_pipeline.text.load import load_text_tokenizer
    from janus_mega.observe.progress import Progress

    options = IndexOptions(on_bad=on_bad, keep_columns=tuple(keep or ()), workers=workers)
    with Progress("index", 0) as bar:
        manifest = index_tars(tars, out, load_text_tokenizer(text_tokenizer), options, bar.reach)
    rejects = ", ".join(f"{count} {reason}" for reason, count in manifest.rejects.items()) or "none"
    print(f"{out}: {manifest.num_samples} pairs in {len(manifest.shards)} tars, {manifest.num_text_tokens} text tokens")
    print(f"left out: {rejects}")
