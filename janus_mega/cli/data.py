"""`janus-mega data ...`: raw data to shards, and what shards and mixtures will give."""

import typer

from janus_mega.cli import blame, index, plan, preview, shards
from janus_mega.cli.mask import mask_app
from janus_mega.cli.prepare import prepare_app

data_app = typer.Typer(
    help="Prepare shards, look into them, and see what a mixture will give.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
data_app.add_typer(prepare_app)
index.add_to(data_app)
data_app.add_typer(mask_app)
shards.add_to(data_app)
blame.add_to(data_app)
preview.add_to(data_app)
plan.add_to(data_app)
