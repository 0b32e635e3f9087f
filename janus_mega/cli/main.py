"""The command `janus-mega`. Heavy imports stand inside commands, so that `--help` answers at once.

Exit codes: 0 done; 2 bad input, told in one line; anything else with a traceback is a defect.
"""

import sys
from typing import Annotated

import typer

from data_pipeline.errors import UserError
from janus_mega import __version__
from janus_mega.cli.data import data_app
from janus_mega.cli.tokenizer import tokenizer_app

USER_ERROR_CODE = 2

ConfigFile = Annotated[str, typer.Argument(metavar="FILE", help="YAML of a run: a path, or a name under configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values of the file.")]

app = typer.Typer(
    name="janus-mega",
    help="Pretrains Janus-style models: images in, images out and text, in one transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")


def main() -> None:
    """Runs the command line; bad input ends in one line and exit code 2."""
    try:
        app(prog_name="janus-mega")
    except UserError as error:
        print(f"janus-mega: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_CODE)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def config(
    file: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(help="Ranks that the rules are checked for.")] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="Also print what each value means.")] = False,
) -> None:
    """Show the resolved configuration with the origin of every value, and check its rules."""
    from janus_mega.cli.show import config_lines
    from janus_mega.config.load import resolve_any
    from janus_mega.config.validate import validate_any

    resolved = resolve_any(file, overrides or [])
    for line in config_lines(resolved, explain=explain):
        print(line)
    validate_any(resolved.config, world_size)


if __name__ == "__main__":
    main()
