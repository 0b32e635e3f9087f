"""Averaged metrics every few steps, and the progress bar."""

from collections import defaultdict

import torch
import torch.distributed as dist

from janus_mega.observe.progress import Progress
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.loop import StepEvent
from janus_mega.train.workload import Workload


class MetricsHook:
    """Writes averaged metrics every few steps and moves the progress bar.

    Losses and the norm come reduced from the engine; amounts (tokens, images) are summed over dp when written.
    """

    def __init__(
        self, workload: Workload, groups: ProcessGroups, sinks: SinkGroup, progress: Progress, log_every: int
    ) -> None:
        self._workload = workload
        self._groups = groups
        self._sinks = sinks
        self._progress = progress
        self._log_every = log_every
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._sums: dict[str, float] = defaultdict(float)
        self._label_counts: dict[str, int] = defaultdict(int)
        self._amounts: dict[str, int] = defaultdict(int)

    def after_step(self, event: StepEvent) -> None:
        """Adds a step; writes a line when due. Collective over: dp (when due)."""
        result = event.result
        self._steps += 1
        for name, loss in result.task_losses.items():
            self._sums[f"loss/{name}"] += loss * result.label_counts[name]
            self._label_counts[name] += result.label_counts[name]
        self._sums["loss"] += result.loss
        self._sums["grad_norm"] += result.grad_norm
        for phase, seconds in {"data": event.data_s, "step": event.step_s, **result.seconds}.items():
            self._sums[f"seconds/{phase}"] += seconds
        for batch in event.batches:
            for name, amount in self._workload.measure(batch).items():
                self._amounts[name] += amount
        self._progress.advance(note=f"loss {result.loss:.3f}")
        if event.step % self._log_every == 0:
            self._write(event.step, result.lr)

    def at_end(self, step: int) -> None:
        """Writes what is left. Collective over: dp."""
        if self._steps:
            self._write(step, None)

    def _write(self, step: int, lr: float | None) -> None:
        names = sorted(self._amounts)
        amounts = torch.tensor([self._amounts[name] for name in names], device=self._groups.device)
        dist.all_reduce(amounts, group=self._groups.dp)
        values = {
            name: total / (self._label_counts[name[5:]] if name.startswith("loss/") else self._steps)
            for name, total in self._sums.items()
        }
        for name, amount in zip(names, amounts.tolist(), strict=True):
            values[f"amount/{name}"] = amount / self._steps
            if name == "tokens":
                values["tokens_per_s"] = amount / self._sums["seconds/step"]
        if lr is not None:
            values["lr"] = lr
        self._sinks.scalars(step, values)
        self._reset()
