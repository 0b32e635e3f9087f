"""Takes out of DeepSpeed's fp32 ZeRO-1 what a step of ours pays for and does not use.

A step of a small model is Python more than arithmetic, and a good part of it was DeepSpeed's bookkeeping. Three things
go, and numbers stay the same bit for bit:

* Hooks on every parameter. They reduce gradients within backward for ZeRO-2 and for overlapping; without either they
  count themselves, which walks the whole graph in every backward. The end of a backward pass is told by autograd.
* Splitting a bucket by owner before it is reduced: all ranks reduce all of it (`ds_config`).
* The norm tensor by tensor, with a copy of a constant to the device, which a device has to wait for.
"""

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def lighten(zero: Any) -> None:
    """Changes a DeepSpeed ZeRO-1 or 2 optimizer in place; another one is left alone."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(zero, DeepSpeedZeroOptimizer):
        return
    zero.get_grad_norm_direct = MethodType(_group_norm, zero)
    if zero.partition_gradients or zero.overlap_comm or zero.use_grad_accum_attribute:
        return
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero._grad_acc_hooks.clear()
    reduce_gradients = zero.reduce_gradients

    def reduce(*args: Any, **options: Any) -> None:
        zero.setup_buckets()  # the first hook did
        reduce_gradients(*args, **options)

    zero.reduce_gradients = reduce


def norm_over_model(tensors: Sequence[Tensor], mpu: Any, device: torch.device) -> Tensor:
    """What DeepSpeed's `get_global_norm_of_tensors` gives its bf16 optimizer: fp32 [] on the device, -1 if no number.

    Also on a rank whose gradients are all counted by tp rank 0, where DeepSpeed's own would fail.

    Collective over: model.
    """
    squared = torch.zeros((), device=device)
    if tensors:
        norms = torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors], 2, torch.float32))
        squared = norms.pow(2.0).sum()
    group = mpu.get_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(squared, group=group)
    norm = squared.pow(0.5)
    return norm.masked_fill_(~norm.isfinite(), -1.0)


def _group_norm(zero: Any, gradients: Iterable[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2) -> Tensor:
    """Norm of one parameter group, fp32 [] on the device; -1 where it is no number, DeepSpeed's mark of that.

    Collective over: dp, model.
    """
    whole = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    counted = [
        gradient
        for gradient, parameter in zip(whole, params, strict=False)
        if getattr(parameter, "tensor_model_parallel", False) or zero.model_parallel_rank == 0
    ]
    squared = torch.zeros((), device=zero.device)
    if counted:
        norms = torch.stack(torch._foreach_norm(counted, norm_type, torch.float64))
        squared = norms.pow(norm_type).sum().float()
    if zero.dp_process_group.size() > 1:
        dist.all_reduce(squared, group=zero.dp_process_group)
    zero._model_parallel_all_reduce(tensor=squared, op=dist.ReduceOp.SUM)
    norm = squared.pow(1.0 / norm_type)
    return norm.masked_fill_(~norm.isfinite(), -1.0)
