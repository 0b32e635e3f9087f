"""`janus-mega tokenizer ...`: training of the text and of the image tokenizer."""

from functools import partial
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


@tokenizer_app.command("train-image")
def train_image(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of an image-tokenizer run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes to start on this machine.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew in a run directory that was used before.")] = False,
) -> None:
    """Train a VQ image tokenizer by the same loop; its frozen directory lies in the run directory."""
    from janus_mega.cli.launched import take_srun_place
    from janus_mega.cli.ranks import on_ranks, started_world_size
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import TokenizerRunConfig
    from janus_mega.config.validate import validate_tokenizer_run

    take_srun_place()
    config = load_config(TokenizerRunConfig, file, overrides or []).config
    validate_tokenizer_run(config, started_world_size(ranks))

    from janus_mega.train.image_tokenizer import TOKENIZER_DIR, train_image_tokenizer

    on_ranks(partial(train_image_tokenizer, fresh=fresh), config, ranks, config.parallel.torch_threads)
    print(Path(config.run_dir) / TOKENIZER_DIR)
