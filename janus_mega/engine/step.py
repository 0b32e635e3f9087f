"""What a step is, whoever owns gradients and optimizer: count, forward and backward, update.

Label counts are summed over dp first, so that every micro-batch's loss is already scaled right; megatron's schedule
runs forward and backward; the backend reduces gradients, clips on the global norm and updates.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from janus_mega.config.schema import OptimizerConfig, ParallelConfig
from janus_mega.engine.interface import ScaleLosses, StepResult
from janus_mega.engine.schedule import ScheduledChunk, run_schedule
from janus_mega.parallel.groups import ProcessGroups


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is built from besides the model."""

    parallel: ParallelConfig
    optimizer: OptimizerConfig
    task_names: tuple[str, ...]
    seq_len: int
    """Rows' length (1 where rows are not sequences)."""


class ScheduledEngine(ABC):
    """The step that all backends share; implements `interface.Engine`."""

    groups: ProcessGroups
    settings: EngineSettings
    _scheduled: list[ScheduledChunk]
    _scale_losses: ScaleLosses

    @abstractmethod
    def _update(self, lr: float) -> float:
        """Reduces gradients, clips, updates at a learning rate (before group scales); returns the gradient norm."""

    def train_step(self, micro_batches: Sequence[Any], label_counts: Tensor, lr: float) -> StepResult:
        """One optimizer step over this dp rank's micro-batches.

        Args:
            micro_batches: what the chunk's forward takes, the same number on every rank.
            label_counts: int64 [tasks], labels in them; summed over dp here.
            lr: learning rate before group scales.

        Raises:
            FloatingPointError: the loss is not finite; nothing was updated.
            Collective over: world.
        """
        start = time.perf_counter()
        global_counts = label_counts.to(self.groups.device, copy=True)
        dist.all_reduce(global_counts, group=self.groups.dp)
        global_counts = global_counts.cpu()
        scales = self._scale_losses(global_counts)
        sums = run_schedule(
            self._scheduled,
            micro_batches,
            scales.to(self.groups.device),
            self.settings.seq_len,
            self.settings.parallel.micro_batch_size,
        )
        total = self._sum_losses(sums)
        if not torch.isfinite(total).all():
            raise FloatingPointError(f"loss sums per task are {total.tolist()}; the step was not applied")
        forward_backward_s = time.perf_counter() - start
        grad_norm = self._update(lr)
        divisor = self.groups.layout.dp_size * len(micro_batches)
        names = self.settings.task_names
        return StepResult(
            loss=float(torch.dot(total, scales.double())) / divisor,
            task_losses={
                name: float(total[i]) / int(global_counts[i]) for i, name in enumerate(names) if global_counts[i] > 0
            },
            label_counts={name: int(global_counts[i]) for i, name in enumerate(names)},
            grad_norm=grad_norm,
            lr=lr,
            seconds={
                "forward_backward": forward_backward_s,
                "update": time.perf_counter() - start - forward_backward_s,
            },
        )

    def _sum_losses(self, sums: Tensor | None) -> Tensor:
        """fp64 [tasks] on the CPU: loss sums of the global batch, equal on all ranks. Collective over: world."""
        layout = self.groups.layout
        total = torch.zeros(len(self.settings.task_names), dtype=torch.float64, device=self.groups.device)
        if sums is not None:
            total += sums.double()
        dist.all_reduce(total)
        return total.cpu() / layout.tp_size  # tp ranks hold the same sums
