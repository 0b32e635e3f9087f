"""`janus-mega data blame` and `data replay`: what was in a global batch, and the same batch made again."""

from typing import Annotated

import typer

from data_pipeline.errors import UserError

_RunFile = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML of a run (a path, or a name under configs/), or a run directory.")
]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values.")]
_Step = Annotated[int, typer.Option(help="Step, from 1, as metrics.jsonl and batches.jsonl count them.")]
DIFFERENT_CODE = 1


blame_app = typer.Typer(rich_markup_mode=None)


@blame_app.command()
def blame(
    file: _RunFile,
    overrides: _Overrides = None,
    step: _Step = 0,
    row: Annotated[int, typer.Option(help="Only this row of the plan, -1 for all of the step.")] = -1,
    uid: Annotated[str, typer.Option(help="32 hex digits: which steps used it, instead of what a step used.")] = "",
    first_step: Annotated[int, typer.Option(help="With --uid: first step to search.")] = 1,
    last_step: Annotated[int, typer.Option(help="With --uid: last step to search; 0 is the run's last.")] = 0,
    world_size: Annotated[int, typer.Option(help="Ranks of the run; tells who had which row.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    html: Annotated[str, typer.Option(help="Also write the batch as an HTML page to this file.")] = "",
) -> None:
    """Tell which documents and images were in a global batch, or which batches used a sample."""
    import json

    from data_pipeline.explain.blame import Layout, as_json_values, blame_step, find_uses
    from data_pipeline.explain.lines import blame_lines, use_lines
    from janus_mega.cli.run_data import open_run_data
    from janus_mega.config import derive

    if bool(uid) == bool(step):
        raise UserError("data blame needs either --step or --uid; give one of them")
    run = open_run_data(file, overrides or [], step=step or first_step)
    if uid:
        steps = range(first_step, (last_step or derive.last_step(run.config.stage)) + 1)
        uses = find_uses(run.data, uid, steps)
        lines = [json.dumps(as_json_values(uses), indent=1)] if as_json else use_lines(uid, uses, steps)
    else:
        layout = run.layout(world_size) if world_size else Layout()
        documents = blame_step(run.data, step, layout)
        if row >= 0:
            documents = [document for document in documents if document.row == row]
            if not documents:
                raise UserError(
                    f"--row {row}: step {step} has no document in this row; leave --row out to see its rows"
                )
        if as_json:
            lines = [json.dumps(as_json_values(documents), indent=1)]
        else:
            lines = blame_lines(documents, shows_ranks=bool(world_size))
        if html:
            from janus_mega.cli.preview import Shown, write_batch_page

            write_batch_page(run, step, layout, html, Shown([row] if row >= 0 else []))
    for line in lines:
        print(line)
    if html:
        print(html)


@blame_app.command()
def replay(
    file: _RunFile,
    overrides: _Overrides = None,
    step: _Step = 0,
    world_size: Annotated[int, typer.Option(help="Ranks to load for; their number must not change the hash.")] = 0,
    workers: Annotated[int, typer.Option(help="Loader processes of each rank.")] = 0,
    expect: Annotated[str, typer.Option(help="Compare with this hash instead of the run's log.")] = "",
) -> None:
    """Load a global batch again and print its hash; given a run directory, compare it with what was trained."""
    from data_pipeline.explain.blame import Layout
    from data_pipeline.explain.replay import BATCHES_FILE, logged_hashes, replay_step, why_different
    from janus_mega.cli.run_data import open_run_data

    if step < 1:
        raise UserError("data replay needs --step, counted from 1; give one")
    run = open_run_data(file, overrides or [], step=step)
    logged = [expect] if expect else logged_hashes(run.run_dir / BATCHES_FILE, step) if run.run_dir else []
    # One rank takes the whole batch as micro-batches of one row, so any configuration can be replayed anywhere.
    found = replay_step(run.data, step, run.layout(world_size) if world_size else Layout(), workers)
    print(f"step {step} {found.batch_hash}")
    for hole in found.holes:
        print(f"  hole in row {hole.row}: {hole.message}")
    if logged and logged[-1] != found.batch_hash:
        print(why_different(found, logged[-1], run.differences(), run.holes()))
        raise typer.Exit(DIFFERENT_CODE)
    if logged:
        print(f"  equal to {'the hash expected' if expect else 'the batch that was trained'}")
