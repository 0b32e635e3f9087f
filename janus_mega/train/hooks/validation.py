"""Losses on fixed rows, set by set and task by task, without learning from them.

The rows go through the same schedule as those of training, forward only, so every layout that trains also validates.
They are read anew each time (a set kept in memory would lie there for the whole run) and scored as many at a time as a
step of training takes, so validation needs no more of the device than training does.
"""

import logging
import time

import torch

from janus_mega.engine.interface import StatefulEngine
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.loop import StepEvent
from janus_mega.train.starting import Start
from janus_mega.train.workload import Recipe, Workload

_log = logging.getLogger(__name__)


class ValidationHook:
    """Writes `validation/<set>/loss` and `validation/<set>/loss/<task>` every few steps and after the last."""

    def __init__(
        self,
        workload: Workload,
        groups: ProcessGroups,
        engine: StatefulEngine,
        sinks: SinkGroup,
        recipe: Recipe,
        hook_seconds: dict[str, float],
        start: Start | None = None,
    ) -> None:
        self._start = start or Start()
        self._workload = workload
        self._groups = groups
        self._engine = engine
        self._sinks = sinks
        self._every = recipe.validate_every
        self._hook_seconds = hook_seconds
        layout = groups.layout
        self._at_a_time = recipe.global_batch_size // (recipe.parallel.micro_batch_size * layout.dp_size)
        self._sets = workload.validation_sets(layout.dp_rank, layout.dp_size)
        self._validated_step = -1

    def after_step(self, event: StepEvent) -> None:
        """Validates when due. Collective over: world (when due)."""
        if event.step % self._every == 0:
            self._validate(event.step)

    def at_end(self, step: int) -> None:
        """Validates the final weights; a run that is to stop does not wait for it. Collective over: world."""
        if self._validated_step != step and not self._start.stop.agreed:
            self._validate(step)

    def _validate(self, step: int) -> None:
        start = time.perf_counter()
        self._start.strike("eval", step)
        values: dict[str, float] = {}
        for name in self._sets:
            losses = self._losses_of(name)
            if self._start.stop.agreed:  # each part was scored on all ranks, so all of them know
                _log.warning("step %d: validation is left out, the run stops", step)
                return
            values |= {f"validation/{name}/{key}": value for key, value in losses.items()}
        self._sinks.scalars(step, values)
        self._validated_step = step
        spent = self._hook_seconds.get("validation", 0.0)
        self._hook_seconds["validation"] = spent + time.perf_counter() - start

    def _losses_of(self, name: str) -> dict[str, float]:
        """Mean per task that has labels, and the joint loss as training would compute it."""
        workload = self._workload
        batches = self._sets[name]()
        sums = torch.zeros(len(workload.task_names), dtype=torch.float64)
        counts = torch.zeros(len(workload.task_names), dtype=torch.int64)
        for start in range(0, len(batches), self._at_a_time):
            if self._start.stop.agreed:
                return {}
            part = batches[start : start + self._at_a_time]
            label_counts = torch.stack([workload.count_labels(batch) for batch in part]).sum(0)
            scored = self._engine.score([workload.place(batch, self._groups) for batch in part], label_counts)
            sums, counts = sums + scored[0], counts + scored[1]
            self._start.pulse.tick()
        weights = torch.tensor([workload.task_weights.get(task, 1.0) for task in workload.task_names]).double()
        losses = {"loss": float((weights * sums / workload.denominators(counts)).sum())}
        for task, total, count in zip(workload.task_names, sums.tolist(), counts.tolist(), strict=True):
            if count:
                losses[f"loss/{task}"] = total / count
        return losses
