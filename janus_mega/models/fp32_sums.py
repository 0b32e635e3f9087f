"""Column- and row-parallel linears whose sums over tensor-parallel ranks are made in fp32 under bf16.

One process multiplies whole matrices: a product is accumulated in fp32 and rounded to bf16 once. megatron's layers
round every rank's part and add the rounded parts, in the forward pass of row-parallel layers and in the backward pass
of column-parallel ones. Here the parts leave the multiplication in fp32, are scattered and summed in fp32, and only the
sum is rounded; without sequence parallelism the rounded pieces are then gathered. So a sum that moved 2 bytes an
element twice moves 4 and 2 (docs/decisions/0007-tp-sums-in-fp32.md). In fp32, on one tp rank, or with
`parallel.tp_sums_in_fp32` off, the layers are megatron's own.

Shapes: `s` rows of the stream (tokens) times `b`, `i` and `o` sizes of the whole layer's input and output.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable


def _product(left: Tensor, right: Tensor) -> Tensor:
    """bf16 [s, b, k] times bf16 [k, n]: fp32 [s, b, n]; on the CPU, which has no such kernel, of widened factors."""
    if not left.is_cuda:
        return left.float() @ right.float()
    flat = torch.mm(left.flatten(0, -2), right, out_dtype=torch.float32)
    return flat.view(*left.shape[:-1], right.shape[-1])


class _SumOverTp:
    """A sum over tp that has been started: fp32 parts [s, b, h] of all ranks to bf16 [s, b, h], or [s/tp, b, h]."""

    def __init__(self, part: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self._shape, self._group, self._is_cut = part.shape, group, sequence_parallel
        flat, size = part.flatten(), group.size()
        if flat.numel() % size:
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % size))
        self._own = flat.new_empty(flat.numel() // size)
        self._sent = flat  # is read until the sum is complete
        self._work = dist.reduce_scatter_tensor(self._own, flat, group=group, async_op=True)

    def finish(self, dtype: torch.dtype) -> Tensor:
        """The sum, rounded. Collective over: tp."""
        self._work.wait()
        own = self._own.to(dtype)
        if self._is_cut:
            return own.view(self._shape[0] // self._group.size(), *self._shape[1:])
        whole = own.new_empty(own.numel() * self._group.size())
        dist.all_gather_into_tensor(whole, own, group=self._group)
        return whole[: self._shape.numel()].view(self._shape)


class _Gathered:
    """Slices of a sequence on their way together: [s/tp, b, h] to [s, b, h]; without slices, what came in."""

    def __init__(self, own: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self._whole, self._work = own, None
        if sequence_parallel:
            self._own = own.contiguous()
            self._whole = own.new_empty(own.shape[0] * group.size(), *own.shape[1:])
            self._work = dist.all_gather_into_tensor(self._whole, self._own, group=group, async_op=True)

    def finish(self) -> Tensor:
        """The whole. Collective over: tp."""
        if self._work is not None:
            self._work.wait()
        return self._whole


def _weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    return grad_output.flatten(0, -2).t() @ x.flatten(0, -2)


class _ColumnProduct(torch.autograd.Function):
    """x [s, b, i] (or [s/tp, b, i]) times a cut of columns: [s, b, o/tp]; the gradient of x is a sum over tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sequence_parallel: bool, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.options = sequence_parallel, group
        return _Gathered(x, group, sequence_parallel).finish() @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        sequence_parallel, group = ctx.options
        gathered = None if x is None else _Gathered(x, group, sequence_parallel)
        part = _product(grad_output, weight) if ctx.needs_input_grad[0] else None
        whole = None if gathered is None else gathered.finish()
        started = None if part is None else _SumOverTp(part, group, sequence_parallel)
        grad_weight = None if whole is None else _weight_gradient(grad_output, whole)
        return None if started is None else started.finish(grad_output.dtype), grad_weight, None, None


class _RowProduct(torch.autograd.Function):
    """x [s, b, i/tp] times a cut of rows, summed over tp: [s, b, o] (or [s/tp, b, o])."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sequence_parallel: bool, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.options = sequence_parallel, group
        return _SumOverTp(_product(x, weight.t()), group, sequence_parallel).finish(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        sequence_parallel, group = ctx.options
        whole = _Gathered(grad_output, group, sequence_parallel).finish()
        grad_x = whole @ weight if ctx.needs_input_grad[0] else None
        return grad_x, None if x is None else _weight_gradient(whole, x), None, None


# Not traced by torch.compile, which would have to take apart sums that are under way; what lies between layers is.
_column_product = torch.compiler.disable(_ColumnProduct.apply)
_row_product = torch.compiler.disable(_RowProduct.apply)


def _sums_in_fp32(layer: Any) -> bool:
    return layer.config.tp_sums_in_fp32 and layer.weight.dtype == torch.bfloat16 and layer.tp_group.size() > 1


class ColumnParallel(ColumnParallelLinear):
    """megatron's column-parallel linear; its config has `tp_sums_in_fp32`."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        if not _sums_in_fp32(self):
            return super()._forward_impl(input, weight, *args, **options)
        output = _column_product(input, weight, self.sequence_parallel, self.tp_group)
        return output if options["bias"] is None else output + options["bias"]


class RowParallel(RowParallelLinear):
    """megatron's row-parallel linear without bias; its config has `tp_sums_in_fp32`."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, i/tp] -> [s, b, o] (or [s/tp, b, o]), and no bias. Collective over: tp."""
        if not _sums_in_fp32(self) or self.bias is not None:
            return super().forward(input_)
        return _row_product(input_, self.weight, self.sequence_parallel, self.tp_group), None
