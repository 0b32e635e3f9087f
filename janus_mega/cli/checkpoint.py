"""`janus-mega checkpoint ...`: which there are, whether they are whole, what they hold, what two have different; files
for another layout."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from janus_mega.checkpoint.reader import CheckpointReader

checkpoint_app = typer.Typer(
    help="List, verify, inspect, compare and reshard training checkpoints.", no_args_is_help=True, rich_markup_mode=None
)

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or the folder of its checkpoints.")]
_Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A step directory, or a run directory: its newest checkpoint.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
_DIFFERENT = 1


@checkpoint_app.command("list")
def list_command(run: _Run, as_json: _Json = False) -> None:
    """List the checkpoints of a run, oldest first; sizes are looked at, contents are not."""
    from janus_mega.checkpoint.format import find_damage
    from janus_mega.checkpoint.manager import list_checkpoints
    from janus_mega.checkpoint.reader import open_checkpoint
    from janus_mega.cli.paths import CHECKPOINTS_DIR

    folder = run / CHECKPOINTS_DIR if (run / CHECKPOINTS_DIR).is_dir() else run
    rows = []
    for found in list_checkpoints(folder):
        damage = find_damage(found.path, content=False)
        files = {} if damage else open_checkpoint(found.path, verify=False).manifest["files"]
        size = sum(entry["bytes"] for entry in files.values())
        rows.append({"path": str(found.path), "step": found.step, "bytes": size, "damage": damage})
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['path']}  step {row['step']:,}  {row['damage'] or format(row['bytes'], ',') + ' bytes'}")
    print(f"{len(rows)} checkpoints, {sum(row['damage'] is not None for row in rows)} damaged")


@checkpoint_app.command()
def verify(checkpoint: _Checkpoint) -> None:
    """Compare every file with the manifest, and the tables with each other; exit code 1 if something is damaged."""
    from janus_mega.checkpoint.format import check_file, check_table, damage_of, find_damage, read_manifest
    from janus_mega.cli.paths import checkpoint_at
    from janus_mega.observe.progress import Progress

    directory = checkpoint_at(checkpoint)
    manifest = read_manifest(directory)
    files = manifest["files"]
    damages = [find_damage(directory, content=False)]
    with Progress("verify", len(files)) as progress:
        for name in files:
            damages.append(damage_of(partial(check_file, directory, manifest, name)))
            progress.advance(note=name)
    damages.append(damage_of(partial(check_table, directory, manifest)))
    found = list(dict.fromkeys(damage for damage in damages if damage))
    for damage in found:
        print(damage)
    print(f"{directory}: {len(files)} files, {len(found)} damaged")
    if found:
        raise typer.Exit(_DIFFERENT)


@checkpoint_app.command()
def inspect(
    checkpoint: _Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
    as_json: _Json = False,
) -> None:
    """Tell where a run stood and what its checkpoint holds; tensors are named, not read."""
    from janus_mega.checkpoint.reader import open_checkpoint
    from janus_mega.cli.paths import checkpoint_at

    reader = open_checkpoint(checkpoint_at(checkpoint))
    state = reader.read_state()
    held = {name: [str(reader.dtype(name)).removeprefix("torch."), list(reader.shape(name))] for name in reader.names}
    if as_json:
        told = {"path": str(reader.directory), "step": state.step, "consumed_rows": state.consumed_rows}
        told |= {"plan_digest": state.plan_digest, "data_cursor": state.data_cursor, "tensors": held}
        print(json.dumps(told, indent=1))
        return
    print(f"{reader.directory}")
    print(f"  step {state.step:,}, {state.consumed_rows:,} rows, plan {state.plan_digest[:12] or 'none'}")
    for line in _parts(reader):
        print(f"  {line}")
    if tensors:
        for name, (dtype, shape) in held.items():
            print(f"  {name}  {dtype} {shape}")


def _parts(reader: "CheckpointReader") -> list[str]:
    """Tensors and values by what they belong to."""
    import math

    from janus_mega.checkpoint.compare import part_of

    parts: dict[str, list[int]] = {}
    for name in reader.names:
        parts.setdefault(part_of(name), []).append(math.prod(reader.shape(name)))
    return [f"{part:<24}{len(sizes):>6,} tensors {sum(sizes):>18,} values" for part, sizes in parts.items()]


@checkpoint_app.command()
def diff(
    first: _Checkpoint,
    second: _Checkpoint,
    weights: Annotated[bool, typer.Option("--weights", help="Leave optimizer and random generators out.")] = False,
    as_json: _Json = False,
) -> None:
    """Compare two checkpoints, whatever layouts wrote them; exit code 1 if they differ."""
    from janus_mega.checkpoint.compare import compare
    from janus_mega.checkpoint.reader import open_checkpoint
    from janus_mega.cli.paths import checkpoint_at
    from janus_mega.observe.progress import Progress

    readers = [open_checkpoint(checkpoint_at(path)) for path in (first, second)]
    with Progress("compare", 0) as progress:
        found = compare(*readers, weights_only=weights, progress=progress.reach)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        for name, (one, other) in found.state.items():
            print(f"{name}: {one} and {other}")
        for path, names in ((readers[0].directory, found.only_first), (readers[1].directory, found.only_second)):
            for name in names:
                print(f"{name}: only in {path} in this shape")
        for tensor in found.different:
            print(
                f"{tensor.name}: {tensor.relative:.2e} of its norm, {tensor.num_different:,} values, at most "
                f"{tensor.largest:.2e}"
            )
        print(f"{found.num_equal} tensors equal, {len(found.different)} differ")
    if not found.are_equal:
        raise typer.Exit(_DIFFERENT)


@checkpoint_app.command()
def reshard(
    checkpoint: _Checkpoint,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that receives the step directory; made if missing.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="The layout: parallel.tp_size=2, ...; the rest is the run's own."
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Ranks of the layout; as many as saved it by default.")] = 0,
) -> None:
    """Write a checkpoint again with files for another layout, so that each of its ranks reads its own share alone.

    A run loads any checkpoint in any layout; this is for loading with many ranks what few have saved. To go on from it,
    let OUT be the folder `checkpoints` of a new run directory.
    """
    from janus_mega.checkpoint.format import CONFIG_FILE
    from janus_mega.checkpoint.reader import open_checkpoint
    from janus_mega.checkpoint.reshard import Target
    from janus_mega.checkpoint.reshard import reshard as write_again
    from janus_mega.cli.paths import checkpoint_at
    from janus_mega.config import derive
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import Backend, RunConfig
    from janus_mega.config.validate import validate_run
    from janus_mega.observe.progress import Progress

    reader = open_checkpoint(checkpoint_at(checkpoint))
    config = load_config(RunConfig, reader.path(CONFIG_FILE), overrides or []).config
    world_size = ranks or int(reader.manifest["world_size"])
    validate_run(config, world_size)
    parallel = config.parallel
    target = Target(
        world_size,
        parallel.tp_size,
        tuple(derive.layer_counts(config.model, parallel)),
        parallel.pp_size,
        cuts_parameters=parallel.backend is Backend.deepspeed and parallel.zero_stage == 3,
    )
    with Progress("reshard", 0) as progress:
        print(write_again(reader, out, target, progress=progress.reach))
