"""`janus-mega data ...`: raw data to shards, and what shards and mixtures will give."""

from pathlib import Path
from typing import Annotated

import typer

from janus_mega.cli.prepare import prepare_app

data_app = typer.Typer(
    help="Prepare shards, look into them, and see what a mixture will give.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
data_app.add_typer(prepare_app)


@data_app.command()
def inspect(
    source: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A directory of shards.")],
    examples: Annotated[int, typer.Option(help="Samples to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell what a directory of shards holds, from its manifest and index."""
    import json

    from data_pipeline.inspection import inspect_source, inspection_lines

    found = inspect_source(source, examples)
    for line in [json.dumps(found, indent=2)] if as_json else inspection_lines(found):
        print(line)


@data_app.command()
def plan(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of a run: a path, or a name under configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values.")] = None,
    steps: Annotated[int, typer.Option(help="Steps to look at; 0 takes the whole stage.")] = 0,
    world_size: Annotated[int, typer.Option(help="Ranks that images are dealt to.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile the data plan of a run and report shares, epochs and padding; nothing is trained."""
    import dataclasses
    import json

    from data_pipeline.plan.report import describe_plan
    from data_pipeline.text.load import load_text_tokenizer
    from janus_mega.cli.show import plan_lines
    from janus_mega.config import derive
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import RunConfig
    from janus_mega.config.validate import validate_run

    config = load_config(RunConfig, file, overrides or []).config
    validate_run(config, world_size)
    report = describe_plan(
        config.data,
        load_text_tokenizer(config.data.text_tokenizer),
        global_batch_size=config.stage.global_batch_size,
        num_steps=steps or derive.last_step(config.stage),
        dp_size=derive.dp_size(config.parallel, world_size),
        micro_batch_size=config.parallel.micro_batch_size,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return
    for line in plan_lines(report):
        print(line)
