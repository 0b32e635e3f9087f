"""`janus-mega stages`: a chain of stages as one file; what trains where, or train it."""

from typing import Annotated

import typer

from data_pipeline.errors import UserError

stages_app = typer.Typer(rich_markup_mode=None)


@stages_app.command()
def stages(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of a chain: a path, or a name under configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values of the file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would train where.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Only print the commands that submit the stages.")] = False,
) -> None:
    """Train stages one after the other, each in processes of its own; run again, it continues where it stopped."""
    from janus_mega.config.load import load_config
    from janus_mega.config.schema_stages import StagesConfig

    if dry_run and slurm:
        raise UserError("--dry-run and --slurm both only print; give one of them")
    chain = load_config(StagesConfig, file, overrides or []).config

    from janus_mega.train.stages import describe_stages, plan_stages, run_stages, slurm_lines

    planned = plan_stages(chain)
    lines = describe_stages(planned) if dry_run else slurm_lines(planned) if slurm else run_stages(planned)
    for line in lines:
        print(line, flush=True)
