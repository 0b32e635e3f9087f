"""`janus-mega data ...`: raw data to shards, and what shards and mixtures will give."""

import typer

data_app = typer.Typer(
    help="Prepare shards, look into them, and see what a mixture will give.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
