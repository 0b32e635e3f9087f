"""The loop.

Restore happens before, in `run`; here: take the micro-batches of a step, let the engine do it, tell the hooks.
No parallelism, no logging format and no file names.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from janus_mega.engine.interface import Engine, StepResult
from janus_mega.optim.lr_schedule import learning_rate
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.starting import Start
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
    start: Start | None = None,
) -> int:
    """Trains from `first_step` completed steps to the recipe's last; returns the number of completed steps.

    Where all ranks know of a wish to stop, training ends earlier, at the end of a step and after its hooks.

    Args:
        start: is told where the rank is (the engine tells the phases of a step), and says when to stop.

    Raises:
        FloatingPointError: a loss was not finite and the engine has no judge; the step was not applied.
        Collective over: world.
    """
    layout, start = groups.layout, start or Start()
    pulse, faults = start.pulse, start.faults
    step = first_step
    pulse.begin_step()
    began = time.perf_counter()
    steps = workload.batches(layout.dp_rank, layout.dp_size, first_step, recipe.last_step)
    for batches in steps:
        placed = [workload.place(batch, groups) for batch in batches]
        label_counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        data_s = time.perf_counter() - began
        lr = learning_rate(step, recipe.num_steps, recipe.optimizer)
        if faults is not None:
            faults.strike("step", step + 1, engine)
        result = engine.train_step(placed, label_counts, lr)
        step += 1
        pulse.end_step(step)
        event = StepEvent(step, result, batches, data_s, time.perf_counter() - began)
        for hook in hooks:
            pulse.begin_hook(type(hook).__name__)
            hook.after_step(event)
        if faults is not None:
            faults.strike_weights(step, engine)
        if start.stop.agreed:
            break
        pulse.begin_step()
        began = time.perf_counter()  # what hooks took belongs to no step
    if isinstance(steps, Generator):
        steps.close()  # workers that read batches end before anything is saved: one killed later would raise here
    for hook in hooks:
        pulse.begin_hook(type(hook).__name__)
        hook.at_end(step)
    return step
