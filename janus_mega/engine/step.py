"""What a step is, whoever owns gradients and optimizer: count, forward and backward, update.

Label counts are summed over dp first, so that every micro-batch's loss is already scaled right; megatron's schedule
runs forward and backward; the backend reduces gradients, clips on the global norm and updates.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from janus_mega.config.schema import OptimizerConfig, ParallelConfig
from janus_mega.engine.interface import JudgeStep, ScaleLosses, StepResult, stop_unless_finite
from janus_mega.engine.schedule import ScheduledChunk, run_schedule
from janus_mega.engine.sent import Mark, Sent
from janus_mega.observe.pulse import Pulse
from janus_mega.observe.stopping import StopFlag
from janus_mega.parallel.groups import ProcessGroups


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is built from besides the model."""

    parallel: ParallelConfig
    optimizer: OptimizerConfig
    task_names: tuple[str, ...]
    seq_len: int
    """Rows' length (1 where rows are not sequences)."""
    judge: JudgeStep = stop_unless_finite
    """Decides before each update whether it is made."""
    pulse: Pulse = field(default_factory=Pulse)
    """Is told the phases of a step."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]] = list
    """What is done to the micro-batches of a step before the first forward pass."""
    stop: StopFlag = field(default_factory=StopFlag)
    """Told to all ranks with the losses of a step."""


class ScheduledEngine(ABC):
    """The step that all backends share; implements `interface.Engine`."""

    groups: ProcessGroups
    settings: EngineSettings
    before_update: Callable[[bool], None] | None = None
    _scheduled: list[ScheduledChunk]
    _scale_losses: ScaleLosses

    @property
    def chunks(self) -> list[nn.Module]:
        """This rank's pieces of the pipeline, for what looks on."""
        return [scheduled.chunk for scheduled in self._scheduled]

    @abstractmethod
    def _update(self, lr: float, accept: Callable[[float], bool]) -> float:
        """Reduces gradients, asks with their norm, then clips and updates or drops them; returns the norm.

        Args:
            lr: learning rate before group scales.
            accept: global gradient norm -> whether to update; to be asked once. If not, weights, moments and the
                optimizer's count stay as they are and nothing of the gradients is left.
        """

    def train_step(self, micro_batches: Sequence[Any], label_counts: Tensor, lr: float) -> StepResult:
        """One optimizer step over this dp rank's micro-batches.

        Args:
            micro_batches: what the chunk's forward takes, the same number on every rank.
            label_counts: int64 [tasks], labels in them; summed over dp here.
            lr: learning rate before group scales.

        Raises:
            FloatingPointError: a loss or the norm is not finite and the engine has no judge; nothing was updated.
            Collective over: world.
        """
        begin, pulse = Mark(self.groups.device), self.settings.pulse
        pulse.enter("forward_backward")
        global_counts = self._sum_counts(label_counts)
        scales = self._scale_losses(global_counts).to(self.groups.device)
        sums = self._run(micro_batches, scales)
        sent = self._send(sums, scales, global_counts)
        heard: list[tuple[_Losses, str]] = []
        normed = time.perf_counter()

        def accept(grad_norm: float) -> bool:
            nonlocal normed
            normed = time.perf_counter()
            pulse.enter("update")
            losses = self._hear(sent, len(micro_batches))
            by_task = {f"loss/{name}": value for name, value in losses.by_task.items()}
            reason = self.settings.judge({"loss": losses.loss, **by_task, "grad_norm": grad_norm})
            heard.append((losses, reason))
            if self.before_update:
                self.before_update(bool(reason))
            return not reason

        pulse.enter("reduce")
        grad_norm = self._update(lr, accept)
        losses, skipped = heard[0]
        forward_backward_s = sent.mark.seconds_since(begin)
        return StepResult(
            loss=losses.loss,
            task_losses=losses.by_task,
            label_counts=losses.label_counts,
            grad_norm=grad_norm,
            lr=lr,
            seconds={
                "forward_backward": forward_backward_s,
                "reduce": normed - begin.host_s - forward_backward_s,
                "update": time.perf_counter() - normed,
            },
            skipped=skipped,
        )

    def score(self, micro_batches: Sequence[Any], label_counts: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of this dp rank's micro-batches without gradients; weights and optimizer stay as they are.

        Args:
            micro_batches: as in `train_step`, of any number that the schedule takes.
            label_counts: int64 [tasks], labels in them.

        Returns:
            fp64 [tasks] sums of losses and int64 [tasks] labels over all dp ranks, both on the CPU.
            Collective over: world.
        """
        global_counts = self._sum_counts(label_counts)
        scales = torch.ones(len(self.settings.task_names), device=self.groups.device)
        with torch.no_grad(), _evaluating(self.chunks):
            sums = self._run(micro_batches, scales, forward_only=True)
        num_tasks, numbers = len(self.settings.task_names), self._send(sums, scales, global_counts).read()
        self.settings.stop.hear(numbers[num_tasks])
        return torch.tensor(numbers[:num_tasks], dtype=torch.float64), torch.tensor(numbers[-num_tasks:]).long()

    def _sum_counts(self, label_counts: Tensor) -> Tensor:
        """Labels of the global batch, left on the device. Collective over: dp."""
        global_counts = label_counts.to(self.groups.device, copy=True, non_blocking=True)
        if self.groups.layout.dp_size > 1:
            dist.all_reduce(global_counts, group=self.groups.dp)
        return global_counts

    def _run(self, micro_batches: Sequence[Any], scales: Tensor, *, forward_only: bool = False) -> Tensor | None:
        settings = self.settings
        micro_size = settings.parallel.micro_batch_size
        return run_schedule(
            self._scheduled,
            settings.prepare(micro_batches),
            scales,
            settings.seq_len,
            micro_size,
            forward_only=forward_only,
            pulse=settings.pulse,
        )

    def _send(self, sums: Tensor | None, scales: Tensor, global_counts: Tensor) -> Sent:
        """What the host must know of a step, in one copy and equal on all ranks.

        Beside the losses goes how many ranks were asked to stop, so that all of them know it after the same step.

        Returns:
            fp64 [2 * tasks + 2]: loss sums of the global batch, the number of `StopFlag`, the scaled sum of the losses,
            label counts. Collective over: world.
        """
        stop, num_tasks = self.settings.stop, len(self.settings.task_names)
        total = torch.zeros(num_tasks + 1, dtype=torch.float64, device=self.groups.device)
        if sums is not None:
            total[:num_tasks] += sums.double()
        if stop.told:
            total[num_tasks] = stop.told
        if self.groups.layout.world_size > 1:
            dist.all_reduce(total)
        total[:num_tasks] /= self.groups.layout.tp_size  # tp ranks hold the same sums
        scaled = torch.dot(total[:num_tasks], scales.double())
        return Sent(torch.cat([total, scaled[None], global_counts.double()]))

    def _hear(self, sent: Sent, num_micro_batches: int) -> "_Losses":
        names, numbers = self.settings.task_names, sent.read()
        sums, (stop, scaled), counts = numbers[: len(names)], numbers[len(names) :][:2], numbers[-len(names) :]
        self.settings.stop.hear(stop)
        by_task = {name: sums[i] / counts[i] for i, name in enumerate(names) if counts[i] > 0}
        label_counts = {name: int(counts[i]) for i, name in enumerate(names)}
        return _Losses(scaled / (self.groups.layout.dp_size * num_micro_batches), by_task, label_counts)


@dataclass(frozen=True, slots=True)
class _Losses:
    """Of one step, equal on every rank; fields as in StepResult."""

    loss: float
    by_task: dict[str, float]
    label_counts: dict[str, int]


@contextmanager
def _evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Chunks in evaluation mode: nothing is kept to be computed again, and what watches training looks away."""
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()
