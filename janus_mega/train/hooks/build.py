"""All hooks of a run, in the order in which they are called after a step.

What decides whether the step stands comes first, what saves it comes last.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from janus_mega.engine.replicas import Replicas
from janus_mega.observe.progress import Progress
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.health import Health
from janus_mega.train.hooks.average import AverageHook
from janus_mega.train.hooks.checkpoints import CheckpointHook
from janus_mega.train.hooks.collection import CollectionHook
from janus_mega.train.hooks.data_log import DataHook
from janus_mega.train.hooks.metrics import MetricsHook
from janus_mega.train.hooks.monitors import MonitorHook
from janus_mega.train.hooks.profiler import ProfilerHook
from janus_mega.train.hooks.replicas import ReplicaHook
from janus_mega.train.hooks.samples import SamplesHook
from janus_mega.train.hooks.skips import SkipHook
from janus_mega.train.hooks.task_gradients import TaskGradientsHook
from janus_mega.train.hooks.validation import ValidationHook
from janus_mega.train.loop import Hook
from janus_mega.train.restoring import LiveState
from janus_mega.train.saving import Saver
from janus_mega.train.starting import Start
from janus_mega.train.workload import Recipe, Workload


@dataclass(frozen=True, slots=True)
class Session:
    """What a run is made of once everything is built; hooks take from it what they need."""

    workload: Workload
    recipe: Recipe
    groups: ProcessGroups
    live: LiveState
    """The engine and what else is saved."""
    sinks: SinkGroup
    progress: Progress
    health: Health
    """Which updates stand."""
    saver: Saver
    saved_step: int
    """Step of the checkpoint that the run continues from, -1 if from none."""
    start: Start
    """Whether to stop, and what is to go wrong on purpose."""


def build_hooks(session: Session) -> list[Hook]:
    """The hooks of a run; those that are not configured do not exist."""
    recipe, logging, groups = session.recipe, session.recipe.logging, session.groups
    hook_seconds: dict[str, float] = {}
    return [
        *_averaging_hooks(session),
        _metrics_hook(session, hook_seconds),
        DataHook(session.workload.order, groups, recipe.run_dir, logging.log_every),
        _skip_hook(session),
        *_looking_hooks(session, hook_seconds),
        CheckpointHook(session.saver, recipe.checkpoint.save_every, session.saved_step, session.sinks, hook_seconds),
    ]


def _averaging_hooks(session: Session) -> list[Hook]:
    """Before what may go back: an update that was made is in the average."""
    return [AverageHook(session.live.average)] if session.live.average else []


def _metrics_hook(session: Session, hook_seconds: dict[str, float]) -> MetricsHook:
    totals = session.live.totals
    return MetricsHook(
        session.workload, session.recipe, session.groups, session.sinks, session.progress, hook_seconds, totals
    )


def _skip_hook(session: Session) -> SkipHook:
    recipe = session.recipe
    writes_to = recipe.run_dir if session.groups.layout.rank == 0 else None
    return SkipHook(session.health, recipe.health, session.workload.order, writes_to, session.saver.go_back)


def _looking_hooks(session: Session, hook_seconds: dict[str, float]) -> Iterator[Hook]:
    """Those that are off unless asked for."""
    recipe, logging, groups, sinks = session.recipe, session.recipe.logging, session.groups, session.sinks
    start = session.start
    if recipe.health.replicas_every:
        replicas = Replicas(session.live.engine, session.live.shards)
        first_step = max(session.saved_step, 0)
        yield ReplicaHook(replicas, groups, recipe.health.replicas_every, recipe.run_dir, first_step)
    if logging.gc_every:
        yield CollectionHook(logging.gc_every)
    if logging.profile_steps:
        first, last = logging.profile_steps
        yield ProfilerHook(recipe.run_dir, groups.layout.rank, (first, last), max(session.saved_step, 0))
    if logging.monitor_every:
        yield MonitorHook(session.live.engine, groups, sinks, logging.monitor_every)
    if logging.task_gradients_every:
        chunk = session.live.engine.chunks[0]
        yield TaskGradientsHook(session.workload, groups, sinks, chunk, logging.task_gradients_every)
    if recipe.validate_every:
        yield ValidationHook(session.workload, groups, session.live.engine, sinks, recipe, hook_seconds, start)
    if recipe.samples.every:
        yield SamplesHook(recipe.samples, recipe.run_dir, groups, sinks, session.saver, hook_seconds, start.stop)
