"""megatron's DistributedDataParallel and DistributedOptimizer as the engine of a step: the second backend.

It does what the DeepSpeed engine does with other code: buckets, reduce-scatter, masters, clipping and AdamW are
megatron's own. Two independent optimizers that agree are the oracle of either; and this one can overlap its reduction
with backward. Optimizer state is cut over dp (about ZeRO-1).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, ParamPredicate, clip_grads, get_megatron_optimizer
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor, nn

from janus_mega.config.schema import Precision
from janus_mega.engine.guards import MegatronGuard
from janus_mega.engine.interface import MOMENTS, ScaleLosses
from janus_mega.engine.schedule import ScheduledChunk
from janus_mega.engine.step import EngineSettings, ScheduledEngine
from janus_mega.optim.param_groups import ParamGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.platform import CudaNamesMeanCpu
from janus_mega.parallel.replicated import sum_replicated_gradients


class MegatronEngine(ScheduledEngine):
    """Trains a rank's chunks under megatron's optimizer; implements `interface.Engine`."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        param_groups: list[ParamGroup],
        groups: ProcessGroups,
        settings: EngineSettings,
        scale_losses: ScaleLosses,
    ) -> None:
        """Wraps materialised chunks. Collective over: world."""
        self.groups = groups
        self.settings = settings
        self._scale_losses = scale_losses
        for chunk in chunks:
            sum_replicated_gradients(chunk, groups, settings.parallel)
        if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:  # neither TransformerEngine nor apex is installed
            clip_grads.l2_norm_impl = _norm_on_device
        with self._platform():
            reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
            self._ddp = [
                DistributedDataParallel(config=chunk.config, ddp_config=reduction, module=chunk) for chunk in chunks
            ]
            self.optimizer = get_megatron_optimizer(
                _optimizer_config(settings), self._ddp, _overrides(param_groups), use_gloo_process_groups=False
            )
        self._guard = MegatronGuard(self.optimizer)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = settings.optimizer.weight_decay * group["wd_mult"]
        self._scheduled = [
            ScheduledChunk(chunk, ddp, number)
            for number, (chunk, ddp) in enumerate(zip(chunks, self._ddp, strict=True))
        ]

    def _platform(self) -> Any:
        """megatron's optimizer asks for CUDA by name; on the CPU the names mean the CPU."""
        return CudaNamesMeanCpu() if self.groups.device.type == "cpu" else nullcontext()

    def _update(self, lr: float, accept: Callable[[float], bool]) -> float:
        """Reduces gradients over dp, clips and steps, or drops them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        with self._platform():
            for ddp in self._ddp:
                ddp.finish_grad_sync()
            grad_norm = self._guard.step(self.optimizer.step, accept)
        for ddp in self._ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return grad_norm

    def fragment(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int] | None:
        """What this rank optimizes of a parameter; see `interface.StatefulEngine`."""
        for part in self._parts():
            if parameter in part.model_param_group_index_map:
                group, order = part.model_param_group_index_map[parameter]
                master = part.optimizer.param_groups[group]["params"][order]
                start = part._get_model_param_range_map(parameter)["param"].start
                if moment is None:
                    return master.detach().float().flatten(), start
                state = part.optimizer.state[master]
                return (state[moment].flatten(), start) if moment in state else None
        return None

    def create_moments(self, step: int) -> None:
        """Makes AdamW look as after `step` updates, with moments of zero."""
        for part in self._parts():
            _create_moments(part.optimizer, step)

    def publish_weights(self) -> None:
        """Copies the fp32 weights into the parameters of all dp ranks. Collective over: dp."""
        with self._platform():
            for part in self._parts():
                part._copy_main_params_to_model_params()
            for ddp in self._ddp:
                ddp.start_param_sync()

    def _parts(self) -> list[Any]:
        """megatron's optimizers of this rank; one without parameters has nothing to tell."""
        return [part for part in self.optimizer.chained_optimizers if not part.is_stub_optimizer]


def _create_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Moments of zero as after `step` updates, which torch counts per parameter and fused kernels per group.

    TransformerEngine's and apex's AdamW, which megatron prefers where they are installed, correct their moments by the
    group's count and begin at 1 where there is none.
    """
    counts_per_parameter = isinstance(optimizer, torch.optim.Adam)  # AdamW is one
    for group in optimizer.param_groups:
        if not counts_per_parameter:
            group["step"] = step
        for master in group["params"]:
            state = optimizer.state[master]
            if counts_per_parameter:
                state["step"] = torch.tensor(float(step))
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master)


def _norm_on_device(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Norm of all tensors, fp32 [1], as megatron's fallback gives it; that one reads every tensor's norm by itself."""
    return torch.stack(torch._foreach_norm(tensor_lists[0])).norm().reshape(1), None


def _optimizer_config(settings: EngineSettings) -> MegatronOptimizerConfig:
    """AdamW as configured; rates and decays of groups are set afterwards."""
    bf16 = settings.parallel.precision is Precision.bf16
    optimizer = settings.optimizer
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        clip_grad=optimizer.clip_grad_norm,
    )


def _overrides(param_groups: Sequence[ParamGroup]) -> dict[ParamKey, Any]:
    """Our groups in megatron's words: a scale of the rate, and whether weights decay.

    megatron leaves multiplying decay by `wd_mult` to its scheduler; without one it would decay every vector.
    """
    overrides = {}
    for group in param_groups:
        members = {id(parameter) for parameter in group.parameters}
        belongs = ParamPredicate(group.name, lambda parameter, members=members: id(parameter) in members)
        overrides[ParamKey(predicate=belongs)] = {
            "lr_mult": group.lr_scale,
            "wd_mult": 1.0 if group.weight_decay else 0.0,
        }
    return overrides
