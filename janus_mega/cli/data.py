"""`janus-mega data ...`: raw data to shards, and what shards and mixtures will give."""

import typer

from janus_mega.cli.blame import blame_app
from janus_mega.cli.index import index_app
from janus_mega.cli.mask import mask_app
from janus_mega.cli.plan import plan_app
from janus_mega.cli.prepare import prepare_app
from janus_mega.cli.preview import preview_app
from janus_mega.cli.shards import shards_app

data_app = typer.Typer(
    help="Prepare shards, look into them, and see what a mixture will give.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for commands in (prepare_app, index_app, mask_app, shards_app, plan_app, preview_app, blame_app):
    data_app.add_typer(commands)
