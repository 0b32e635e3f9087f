"""One run from start to end: build, restore, train, save. The same for every workload.

Order: chunk on the meta device -> memory -> weights (the run's own newest checkpoint, else init_from, else fresh) ->
engine -> optimizer state -> loop. A stage border is a process border, so starting the next stage is `init_from`.
"""

import logging
from pathlib import Path

import torch

from janus_mega.checkpoint.manager import find_latest
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.config.schema import Backend
from janus_mega.engine.call_check import check_calls
from janus_mega.engine.deepspeed_backend import DeepSpeedEngine
from janus_mega.engine.interface import JudgeStep, StatefulEngine, stop_unless_finite
from janus_mega.engine.megatron_backend import MegatronEngine
from janus_mega.engine.step import EngineSettings
from janus_mega.models.backbone import compile_layers
from janus_mega.models.losses import loss_scales
from janus_mega.models.sharding import ShardedParameter, sharded_parameters
from janus_mega.observe.oom import memory_snapshot_on_failure
from janus_mega.observe.progress import Progress
from janus_mega.observe.pulse import Pulse
from janus_mega.observe.sinks import open_sinks
from janus_mega.optim.param_groups import build_param_groups
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.health import Health, any_rank
from janus_mega.train.hooks.build import Session, build_hooks
from janus_mega.train.loop import train
from janus_mega.train.restoring import LiveState, check_resume, fill_masters, fill_parameters
from janus_mega.train.saving import CHECKPOINTS_DIR, Saver, claim_checkpoints
from janus_mega.train.watch import Watch
from janus_mega.train.workload import Recipe, Workload

_log = logging.getLogger(__name__)

_BACKENDS: dict[Backend, type[DeepSpeedEngine] | type[MegatronEngine]] = {
    Backend.deepspeed: DeepSpeedEngine,
    Backend.megatron: MegatronEngine,
}


def run(workload: Workload, recipe: Recipe, groups: ProcessGroups) -> Path:
    """Trains a workload to its last step and returns its final checkpoint; continues where an earlier run stopped.

    Raises:
        UserError: the run directory's checkpoint was made under another data plan, or init_from does not fit.
        Collective over: world.
    """
    layout = groups.layout
    root = recipe.run_dir / CHECKPOINTS_DIR
    place = claim_checkpoints(recipe.run_dir, groups)  # first, so that no older attempt adds to what is found
    latest = find_latest(root)
    reader = open_checkpoint(latest) if latest else None
    first_step = check_resume(reader, workload, recipe) if reader else 0
    if latest and first_step >= recipe.last_step:
        _log.info("%s: %s is already at its last step", recipe.name, latest)
        return latest
    health, pulse = Health(recipe.health, any_rank(groups)), Pulse()
    engine, shards = build_engine(workload, recipe, groups, reader, health.judge, pulse)
    live = LiveState(workload, recipe, engine, shards, health)
    if reader:
        live.resume(reader)
    else:
        live.begin()
    if layout.rank == 0:
        workload.order.keep(recipe.run_dir)

    is_writer = layout.rank == 0
    with (
        open_sinks(
            recipe.run_dir, tensorboard=recipe.logging.tensorboard, wandb=recipe.logging.wandb, enabled=is_writer
        ) as sinks,
        Progress(recipe.name, recipe.last_step - first_step, enabled=is_writer) as progress,
        memory_snapshot_on_failure(recipe.run_dir, layout.rank, history=recipe.logging.memory_history),
        Watch(pulse, recipe.health, recipe.run_dir, groups),
        Saver(workload, recipe, live, place, pulse) as saver,
    ):
        session = Session(
            workload, recipe, groups, live, sinks, progress, health, saver, saved_step=first_step if reader else -1
        )
        train(engine, workload, recipe, groups, build_hooks(session), first_step, pulse)
    final = find_latest(root)
    assert final is not None  # the checkpoint hook has just saved
    return final


def build_engine(
    workload: Workload,
    recipe: Recipe,
    groups: ProcessGroups,
    reader: CheckpointReader | None = None,
    judge: JudgeStep = stop_unless_finite,
    pulse: Pulse | None = None,
) -> tuple[StatefulEngine, list[ShardedParameter]]:
    """The engine of a workload with its weights in place, and the table of its parameters.

    Args:
        reader: the run's own checkpoint; without one, `recipe.init_from` or fresh values fill the weights.
        judge: decides before each update whether it is made.
        pulse: is told the phases of a step.
        Collective over: world.
    """
    layout = groups.layout
    built = workload.build(groups)
    chunks = [chunk.to_empty(device=groups.device) for chunk in built.chunks]
    shards = list(sharded_parameters(chunks, layout))
    if reader is None and recipe.init_from:
        reader = open_checkpoint(Path(recipe.init_from))
    if reader:
        fill_parameters(reader, shards)
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
        pulse or Pulse(),
        prepare=built.prepare,
    )
    engine = _BACKENDS[recipe.parallel.backend](chunks, param_groups, groups, settings, scale_losses)
    if reader:
        fill_masters(reader, engine, shards)
    return engine, shards
