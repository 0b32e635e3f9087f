"""Losses on fixed rows, set by set and task by task, without learning from them.

The rows go through the same schedule as those of training, forward only, so every layout that trains also validates.
They are read anew each time: a set kept in memory would lie there once per rank for the whole run.
"""

import time

import torch

from janus_mega.engine.interface import StatefulEngine
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.loop import StepEvent
from janus_mega.train.workload import Workload


class ValidationHook:
    """Writes `validation/<set>/loss` and `validation/<set>/loss/<task>` every few steps and after the last."""

    def __init__(
        self,
        workload: Workload,
        groups: ProcessGroups,
        engine: StatefulEngine,
        sinks: SinkGroup,
        every: int,
        hook_seconds: dict[str, float],
    ) -> None:
        self._workload = workload
        self._groups = groups
        self._engine = engine
        self._sinks = sinks
        self._every = every
        self._hook_seconds = hook_seconds
        self._sets = workload.validation_sets(groups.layout.dp_rank, groups.layout.dp_size)
        self._validated_step = -1

    def after_step(self, event: StepEvent) -> None:
        """Validates when due. Collective over: world (when due)."""
        if event.step % self._every == 0:
            self._validate(event.step)

    def at_end(self, step: int) -> None:
        """Validates the final weights. Collective over: world."""
        if self._validated_step != step:
            self._validate(step)

    def _validate(self, step: int) -> None:
        start = time.perf_counter()
        values: dict[str, float] = {}
        for name in self._sets:
            values |= {f"validation/{name}/{key}": value for key, value in self._losses_of(name).items()}
        self._sinks.scalars(step, values)
        self._validated_step = step
        spent = self._hook_seconds.get("validation", 0.0)
        self._hook_seconds["validation"] = spent + time.perf_counter() - start

    def _losses_of(self, name: str) -> dict[str, float]:
        """Mean per task that has labels, and the joint loss as training would compute it."""
        workload = self._workload
        batches = self._sets[name]()
        label_counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        sums, counts = self._engine.score([workload.place(batch, self._groups) for batch in batches], label_counts)
        weights = torch.tensor([workload.task_weights.get(task, 1.0) for task in workload.task_names]).double()
        losses = {"loss": float((weights * sums / workload.denominators(counts)).sum())}
        for task, total, count in zip(workload.task_names, sums.tolist(), counts.tolist(), strict=True):
            if count:
                losses[f"loss/{task}"] = total / count
        return losses
