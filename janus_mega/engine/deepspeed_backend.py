"""DeepSpeed ZeRO as the engine of a step: megatron's schedule runs the micro-batches, DeepSpeed owns the rest.

Order of a step: label counts are summed over dp (so that every micro-batch's loss is already scaled right), the
schedule runs forward and backward, DeepSpeed reduces gradients, clips on the global norm and updates.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from janus_mega.config.schema import OptimizerConfig, ParallelConfig
from janus_mega.engine.anchors import AnchoredChunk
from janus_mega.engine.ds_config import deepspeed_config
from janus_mega.engine.interface import ScaleLosses, StepResult
from janus_mega.engine.mpu import Mpu
from janus_mega.engine.schedule import ScheduledChunk, run_schedule
from janus_mega.optim.param_groups import ParamGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.replicated import sum_replicated_gradients


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is built from besides the model."""

    parallel: ParallelConfig
    optimizer: OptimizerConfig
    task_names: tuple[str, ...]
    seq_len: int
    """Rows' length (1 where rows are not sequences)."""


class DeepSpeedEngine:
    """Trains one chunk under ZeRO; implements `interface.Engine`."""

    def __init__(
        self,
        chunk: nn.Module,
        param_groups: list[ParamGroup],
        groups: ProcessGroups,
        settings: EngineSettings,
        scale_losses: ScaleLosses,
    ) -> None:
        """Wraps a materialised chunk. Collective over: world."""
        deepspeed = _import_deepspeed(groups.device)
        self.chunk = chunk
        self.groups = groups
        self.settings = settings
        self._scale_losses = scale_losses
        sum_replicated_gradients(chunk, groups, settings.parallel.sequence_parallel)
        anchored = AnchoredChunk(chunk, param_groups, groups.device, chunk.config.params_dtype)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=anchored,
            optimizer=_adamw(param_groups, settings.optimizer),
            config=deepspeed_config(settings.parallel, settings.optimizer.clip_grad_norm),
            mpu=Mpu(groups),
            dist_init_required=False,
        )
        self._lr_scales = [group.lr_scale for group in param_groups]
        self._scheduled = ScheduledChunk(chunk, self._engine)

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
        for group, scale in zip(self.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
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


def _adamw(param_groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.AdamW:
    groups = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in param_groups]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, joined to the running job; on the CPU without its C++ shared-memory op."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        # The op would be compiled on first use, and a machine without a compiler would fail; gloo does the job.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
