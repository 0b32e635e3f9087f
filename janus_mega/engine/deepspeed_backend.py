"""DeepSpeed ZeRO as the engine of a step: megatron's schedule runs the micro-batches, DeepSpeed owns the rest."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from janus_mega.config.schema import OptimizerConfig
from janus_mega.engine.anchors import AnchoredChunks
from janus_mega.engine.ds_config import deepspeed_config
from janus_mega.engine.guards import ZeroGuard
from janus_mega.engine.interface import MOMENTS, ScaleLosses
from janus_mega.engine.light_zero import lighten
from janus_mega.engine.mpu import Mpu
from janus_mega.engine.schedule import ScheduledChunk
from janus_mega.engine.step import EngineSettings, ScheduledEngine
from janus_mega.optim.adamw import PiecewiseAdamW
from janus_mega.optim.param_groups import ParamGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.replicated import sum_replicated_gradients


class DeepSpeedEngine(ScheduledEngine):
    """Trains a rank's chunks under ZeRO; implements `interface.Engine`."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        param_groups: list[ParamGroup],
        groups: ProcessGroups,
        settings: EngineSettings,
        scale_losses: ScaleLosses,
    ) -> None:
        """Wraps materialised chunks. Collective over: world."""
        deepspeed = _import_deepspeed(groups.device)
        self.groups = groups
        self.settings = settings
        self._scale_losses = scale_losses
        for chunk in chunks:
            sum_replicated_gradients(chunk, groups, settings.parallel)
        anchored = AnchoredChunks(chunks, param_groups, groups.device, chunks[0].config.params_dtype)
        num_trained = sum(parameter.numel() for group in param_groups for parameter in group.parameters)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=anchored,
            optimizer=_adamw(param_groups, settings.optimizer),
            config=deepspeed_config(settings.parallel, settings.optimizer.clip_grad_norm, num_trained),
            mpu=Mpu(groups),
            dist_init_required=False,
        )
        lighten(self.optimizer)
        self._guard = ZeroGuard(self.optimizer)
        self._lr_scales = [group.lr_scale for group in param_groups]
        self._scheduled = [
            ScheduledChunk(chunk, partial(self._engine, chunk_no=number), number) for number, chunk in enumerate(chunks)
        ]

    def _update(self, lr: float, accept: Callable[[float], bool]) -> float:
        """DeepSpeed has reduced in backward or does so now; it clips and steps, or drops the gradients."""
        for group, scale in zip(self.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale
        return self._guard.step(self._engine.step, accept)

    def fragment(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int] | None:
        """What this rank optimizes of a parameter; see `interface.StatefulEngine`."""
        if hasattr(parameter, "ds_id"):
            return self._zero3_fragment(parameter, moment)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        address, start = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
        if moment is None:
            return mapping.get_hp_fragment(), start
        # Looked up in AdamW itself: DeepSpeed links moments to fragments after its first group stepped, so those of
        # later groups are missing from its own table.
        inner = self.optimizer.optimizer
        state = inner.state[inner.param_groups[mapping.param_group_index]["params"][0]]
        return (state[moment].narrow(0, address.start, address.numel), start) if moment in state else None

    def _zero3_fragment(self, parameter: Any, moment: str | None) -> tuple[Tensor, int] | None:
        if not parameter.requires_grad:
            return _without_padding(parameter, parameter.ds_tensor.float())
        zero = self.optimizer
        flat = zero.get_local_fp32_param(parameter)
        if moment is not None:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            state = zero.optimizer.state[zero.fp32_partitioned_groups_flat[group]]
            if moment not in state:
                return None
            flat = state[moment].narrow(0, offset, size)
        return _without_padding(parameter, flat)

    def create_moments(self, step: int) -> None:
        """Makes AdamW look as after `step` updates, with moments of zero."""
        zero = self.optimizer
        flats = getattr(zero, "fp32_partitioned_groups_flat", None)
        if flats is None:
            flats = [parameter for group in zero.optimizer.param_groups for parameter in group["params"]]
        for flat in flats:
            state = zero.optimizer.state[flat]
            state["step"] = torch.tensor(float(step))
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(flat)

    def publish_weights(self) -> None:
        """Copies the fp32 weights into the parameters of all dp ranks. Collective over: dp."""
        zero = self.optimizer
        if hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _without_padding(parameter: Any, flat: Tensor) -> tuple[Tensor, int] | None:
    """ZeRO-3 gives every dp rank an equal part; the last parts may be padding."""
    start = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
    size = min(flat.numel(), parameter.ds_numel - start)
    return (flat.flatten()[:size], start) if size > 0 else None


def _adamw(param_groups: list[ParamGroup], config: OptimizerConfig) -> PiecewiseAdamW:
    groups = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in param_groups]
    return PiecewiseAdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, joined to the running job; on the CPU without its C++ shared-memory op."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        # The op would be compiled on first use, and a machine without a compiler would fail; gloo does the job.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    supported = sys.modules["deepspeed.runtime.zero.utils"].ZERO_SUPPORTED_OPTIMIZERS  # type: ignore[attr-defined]
    if PiecewiseAdamW not in supported:
        supported.append(PiecewiseAdamW)  # torch's AdamW to the bit; DeepSpeed warns of classes it does not know
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
