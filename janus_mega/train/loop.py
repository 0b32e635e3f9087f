"""The loop.

Restore happens before, in `run`; here: take the micro-batches of a step, let the engine do it, tell the hooks.
No parallelism, no logging format and no file names.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from janus_mega.engine.interface import Engine, StepResult
from janus_mega.observe.pulse import Pulse
from janus_mega.optim.lr_schedule import learning_rate
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.workload import Recipe, Workload


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What hooks are told after a step."""

    step: int
    """Completed optimizer steps."""
    result: StepResult
    batches: Sequence[Any]
    """This dp rank's micro-batches, as loaded."""
    data_s: float
    """Seconds spent waiting for and placing them."""
    step_s: float
    """Seconds of the whole step, hooks apart."""


class Hook(Protocol):
    """Something that happens beside training; called on every rank, in the order given to `train`."""

    def after_step(self, event: StepEvent) -> None:
        """Called after each step. May be collective, if it is so on every rank."""

    def at_end(self, step: int) -> None:
        """Called once after the last step."""


def train(
    engine: Engine,
    workload: Workload,
    recipe: Recipe,
    groups: ProcessGroups,
    hooks: Sequence[Hook],
    first_step: int,
    pulse: Pulse | None = None,
) -> int:
    """Trains from `first_step` completed steps to the recipe's last; returns the number of completed steps.

    Args:
        pulse: is told where the rank is; the engine tells it the phases of a step.

    Raises:
        FloatingPointError: a loss was not finite and the engine has no judge; the step was not applied.
        Collective over: world.
    """
    layout = groups.layout
    pulse = pulse or Pulse()
    step = first_step
    pulse.begin_step()
    start = time.perf_counter()
    for batches in workload.batches(layout.dp_rank, layout.dp_size, first_step, recipe.last_step):
        placed = [workload.place(batch, groups) for batch in batches]
        label_counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        data_s = time.perf_counter() - start
        lr = learning_rate(step, recipe.num_steps, recipe.optimizer)
        result = engine.train_step(placed, label_counts, lr)
        step += 1
        pulse.end_step(step)
        event = StepEvent(step, result, batches, data_s, time.perf_counter() - start)
        for hook in hooks:
            pulse.begin_hook(type(hook).__name__)
            hook.after_step(event)
        pulse.begin_step()
        start = time.perf_counter()  # what hooks took belongs to no step
    for hook in hooks:
        pulse.begin_hook(type(hook).__name__)
        hook.at_end(step)
    return step
