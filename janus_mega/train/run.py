"""One run from start to end: build, restore, train, save. The same for every workload.

Order: chunk on the meta device -> memory -> weights (the run's own newest checkpoint, else init_from, else fresh) ->
engine -> optimizer state -> loop. A stage border is a process border, so starting the next stage is `init_from`.
"""

import logging
import signal
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.checkpoint.retention import check_space
from janus_mega.config.schema import Backend
from janus_mega.engine.call_check import check_calls
from janus_mega.engine.deepspeed_backend import DeepSpeedEngine
from janus_mega.engine.interface import MOMENTS, JudgeStep, StatefulEngine, stop_unless_finite
from janus_mega.engine.megatron_backend import MegatronEngine
from janus_mega.engine.step import EngineSettings
from janus_mega.models.backbone import compile_layers
from janus_mega.models.losses import loss_scales
from janus_mega.models.sharding import ShardedParameter, sharded_parameters
from janus_mega.observe.oom import memory_snapshot_on_failure
from janus_mega.observe.progress import Progress
from janus_mega.observe.sinks import open_sinks
from janus_mega.observe.stopping import StopFlag
from janus_mega.optim.param_groups import build_param_groups
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.entering import Entry, enter
from janus_mega.train.exits import Stopped
from janus_mega.train.health import Health, any_rank
from janus_mega.train.hooks.build import Session, build_hooks
from janus_mega.train.loop import train
from janus_mega.train.restoring import LiveState, fill_masters, fill_parameters
from janus_mega.train.saving import Saver
from janus_mega.train.starting import Start
from janus_mega.train.together import on_rank_0
from janus_mega.train.watch import Watch
from janus_mega.train.workload import Recipe, Workload

_log = logging.getLogger(__name__)

_BACKENDS: dict[Backend, type[DeepSpeedEngine] | type[MegatronEngine]] = {
    Backend.deepspeed: DeepSpeedEngine,
    Backend.megatron: MegatronEngine,
}

_RANKS_TOLD = 8
_BYTES_PER_VALUE = 4  # checkpoints hold fp32


def run(workload: Workload, recipe: Recipe, groups: ProcessGroups, start: Start | None = None) -> Path:
    """Trains a workload to its last step and returns its final checkpoint; continues where an earlier run stopped.

    Raises:
        Stopped: a signal asked for it; everything is saved.
        UserError: the run directory's checkpoint was made under another data plan, or init_from does not fit.
        Collective over: world.
    """
    start = start or Start()
    with Watch(start.pulse, recipe.health, recipe.run_dir, groups):
        entry = enter(workload, recipe, groups, start)
        if entry.place is None:
            assert entry.reader is not None  # or there would be something left to do
            _log.info("%s: %s is already at its last step", recipe.name, entry.reader.directory)
            return entry.reader.directory
        place = entry.place
        if entry.reader:
            start.strike("load", entry.first_step)
        health = Health(recipe.health, any_rank(groups))
        engine, shards = build_engine(workload, recipe, groups, entry.reader, health.judge, start)
        live = LiveState(workload, recipe, engine, shards, health)
        if entry.reader:
            live.resume(entry.reader)
            entry = replace(entry, reader=None)  # its tables are large where ranks are many
        else:
            live.begin()
        _require_space(live, place.root, recipe)
        if groups.layout.rank == 0:
            workload.order.keep(recipe.run_dir)
        step = _train(workload, recipe, live, health, entry, start)
    final = Path(on_rank_0(groups, lambda: _saved_at(place.root, step)))
    if start.stop.agreed and step < recipe.last_step:
        raise Stopped(
            f"{recipe.name}: {_who_asked(start.stop, groups)}; step {step} of {recipe.last_step} is saved as {final}, "
            "the same command goes on from there"
        )
    return final


def _train(workload: Workload, recipe: Recipe, live: LiveState, health: Health, entry: Entry, start: Start) -> int:
    """The loop with everything that is open while it runs; returns the completed steps, the last of which is saved."""
    assert entry.place is not None
    engine, first_step = live.engine, entry.first_step
    groups, is_writer = engine.groups, engine.groups.layout.rank == 0
    with (
        open_sinks(
            recipe.run_dir, tensorboard=recipe.logging.tensorboard, wandb=recipe.logging.wandb, enabled=is_writer
        ) as sinks,
        Progress(recipe.name, recipe.last_step - first_step, enabled=is_writer) as progress,
        memory_snapshot_on_failure(recipe.run_dir, groups.layout.rank, history=recipe.logging.memory_history),
        Saver(workload, recipe, live, entry.place, start) as saver,
    ):
        saver.damaged |= entry.damaged
        if start.faults is not None:
            saver.disk = start.faults.disk()
        saved_step = first_step if entry.is_resumed else -1
        session = Session(workload, recipe, groups, live, sinks, progress, health, saver, saved_step, start)
        return train(engine, workload, recipe, groups, build_hooks(session), first_step, start)


def _require_space(live: LiveState, root: Path, recipe: Recipe) -> None:
    """Raises UserError where the disk has no room for the checkpoints that retention keeps. Collective over: world."""
    groups, layout = live.engine.groups, live.engine.groups.layout
    parts = 1 + len(MOMENTS) + (live.average is not None)
    sizes = [
        _BYTES_PER_VALUE * prod(shard.local_shape) * (parts if shard.parameter.requires_grad else 1)
        for shard in live.shards
        if layout.dp_rank == 0 and (shard.is_cut or layout.tp_rank == 0)
    ]
    num_bytes = torch.tensor(sum(sizes))
    dist.all_reduce(num_bytes, group=groups.host)
    on_rank_0(groups, lambda: check_space(root, int(num_bytes.item()), recipe.checkpoint.keep_last))


def _saved_at(root: Path, step: int) -> str:
    """The newest checkpoint of a step; its name at least, should a newer attempt have removed it just now."""
    found = [entry.path for entry in list_checkpoints(root) if entry.step == step]
    return str(found[-1] if found else root / f"step-{step:08d}")


def _who_asked(stop: StopFlag, groups: ProcessGroups) -> str:
    """Which signals stopped a run, and on which ranks. Collective over: world."""
    numbers = torch.zeros(groups.layout.world_size, dtype=torch.int64, device=groups.device)
    numbers[groups.layout.rank] = stop.signal
    dist.all_reduce(numbers)
    asked = [(rank, signal.Signals(number).name) for rank, number in enumerate(numbers.tolist()) if number]
    names = sorted({name for _, name in asked})
    ranks = ", ".join(str(rank) for rank, _ in asked[:_RANKS_TOLD]) + (", ..." if len(asked) > _RANKS_TOLD else "")
    return f"stopped by {' and '.join(names)} on rank {ranks}"


def build_engine(
    workload: Workload,
    recipe: Recipe,
    groups: ProcessGroups,
    reader: CheckpointReader | None = None,
    judge: JudgeStep = stop_unless_finite,
    start: Start | None = None,
) -> tuple[StatefulEngine, list[ShardedParameter]]:
    """The engine of a workload with its weights in place, and the table of its parameters.

    Args:
        reader: the run's own checkpoint; without one, `recipe.init_from` or fresh values fill the weights.
        judge: decides before each update whether it is made.
        start: is told the phases of a step, and whether to stop.
        Collective over: world.
    """
    layout, start = groups.layout, start or Start()
    built = workload.build(groups)
    chunks = [chunk.to_empty(device=groups.device) for chunk in built.chunks]
    shards = list(sharded_parameters(chunks, layout))
    if reader is None and recipe.init_from:
        reader = open_checkpoint(Path(recipe.init_from))
    if reader:
        fill_parameters(reader, shards, groups)
    else:
        workload.initialize(shards)
    if recipe.parallel.check_calls:
        check_calls(chunks, {name: built.modules[name] for name in built.trainable}, groups)
    if recipe.parallel.compile:
        for chunk in chunks:
            compile_layers(chunk.decoder)
    param_groups = build_param_groups(chunks, built.modules, built.trainable, recipe.optimizer)
    num_micro_batches = recipe.global_batch_size // (recipe.parallel.micro_batch_size * layout.dp_size)

    def scale_losses(global_counts: torch.Tensor) -> torch.Tensor:
        denominators = workload.denominators(global_counts)
        return loss_scales(denominators, workload.task_names, workload.task_weights, layout.dp_size, num_micro_batches)

    settings = EngineSettings(
        recipe.parallel,
        recipe.optimizer,
        workload.task_names,
        workload.seq_len,
        judge,
        start.pulse,
        prepare=built.prepare,
        stop=start.stop,
    )
    engine = _BACKENDS[recipe.parallel.backend](chunks, param_groups, groups, settings, scale_losses)
    if reader:
        fill_masters(reader, engine, shards)
    return engine, shards
