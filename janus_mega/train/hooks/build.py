"""All hooks of a run, in the order in which they are called after a step.

What decides whether the step stands comes first, what saves it comes last.
"""

from collections.abc import Callable
from dataclasses import dataclass

from janus_mega.engine.interface import StatefulEngine
from janus_mega.observe.progress import Progress
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.hooks.checkpoints import CheckpointHook
from janus_mega.train.hooks.data_log import DataHook
from janus_mega.train.hooks.metrics import MetricsHook
from janus_mega.train.loop import Hook
from janus_mega.train.workload import Recipe, Workload


@dataclass(frozen=True, slots=True)
class Session:
    """What a run is made of once everything is built; hooks take from it what they need."""

    workload: Workload
    recipe: Recipe
    groups: ProcessGroups
    engine: StatefulEngine
    sinks: SinkGroup
    progress: Progress
    save: Callable[[int], object]
    """Saves a checkpoint of a step. Collective over: world."""
    saved_step: int
    """Step of the checkpoint that the run continues from, -1 if from none."""


def build_hooks(session: Session) -> list[Hook]:
    """The hooks of a run."""
    recipe, logging = session.recipe, session.recipe.logging
    return [
        MetricsHook(session.workload, session.groups, session.sinks, session.progress, logging.log_every),
        DataHook(session.workload.order, session.groups, recipe.run_dir, logging.log_every),
        CheckpointHook(session.save, recipe.checkpoint.save_every, session.saved_step),
    ]
