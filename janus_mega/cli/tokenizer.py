"""`janus-mega tokenizer ...`: training of the text and of the image tokenizer."""

from pathlib import Path
from typing import Annotated

import typer

tokenizer_app = typer.Typer(
    help="Train the text tokenizer or the image tokenizer.", no_args_is_help=True, rich_markup_mode=None
)


@tokenizer_app.command("train-text")
def train_text(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Text files, .jsonl, or directories.")],
    out: Annotated[Path, typer.Option(help="The .model file to write.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces in all, special tokens and 256 bytes included.")] = 32_000,
    threads: Annotated[int, typer.Option(help="Threads of the trainer; the result does not depend on it.")] = 1,
) -> None:
    """Train a sentencepiece tokenizer with the special tokens of Janus."""
    from data_pipeline.text.train import train_sentencepiece

    tokenizer = train_sentencepiece(inputs, vocab_size, out, num_threads=threads)
    print(f"{out}: {tokenizer.vocab_size} pieces, digest {tokenizer.digest[:12]}")
