"""Asks before an optimizer's update whether the step may stand, at the moment its global gradient norm is known.

Both backends clip and update in one call; the norm exists only inside that call. So the guards wrap the function that
computes it. A refused step then leaves ZeRO by the way out that it has for overflows of fp16, taken here in any
precision and for any reason: gradients are dropped; weights, moments and the optimizer's count of updates stay. Where
there is no such way (megatron) the update behind the norm is left out, and buffers are cleared as after every step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from janus_mega.engine.light_zero import norm_over_model

AcceptNorm = Callable[[float], bool]
"""Global gradient norm before clipping (inf if it is no number) -> whether to update; equal on all ranks."""


class _Guard:
    """Keeps the norm of a step and asks about it once."""

    def __init__(self) -> None:
        self._accept: AcceptNorm | None = None
        self._norm = math.inf
        self.is_refused = False

    def step(self, update: Callable[[], object], accept: AcceptNorm) -> float:
        """Runs an optimizer's update under guard; returns the gradient norm. Collective over: world."""
        self._accept, self._norm, self.is_refused = accept, math.inf, False
        update()
        if self._accept is not None:  # bf16: DeepSpeed saw the overflow itself and left before the norm
            self._ask(math.inf)
        return self._norm

    def _ask(self, norm: float) -> None:
        accept, self._accept = self._accept, None
        if accept is not None:
            # What is no number arrives as such, or as -1, DeepSpeed's mark of it.
            self._norm = norm if 0 <= norm < math.inf else math.inf
            self.is_refused = not accept(self._norm)


class ZeroGuard(_Guard):
    """Stands between norm and update of a DeepSpeed ZeRO optimizer.

    DeepSpeed looks at the norm several times, and a look is a wait for the device; so it is handed the host's copy.
    """

    def __init__(self, zero: Any) -> None:
        """Wraps the optimizer's norm, in place."""
        super().__init__()
        self._zero = zero
        if hasattr(zero, "scaled_global_norm"):
            self._compute = zero.scaled_global_norm
            zero.scaled_global_norm = self._global_norm
        elif hasattr(zero, "_get_norm_groups"):
            self._compute = zero._get_norm_groups
            zero._get_norm_groups = self._norm_groups
        else:
            self._apply = zero.step
            zero.step = self._step_in_bf16

    def _global_norm(self, *args: Any) -> Tensor:
        """ZeRO-1 and 2: the norm itself."""
        return self._known(self._compute(*args))

    def _norm_groups(self) -> list[Tensor]:
        """ZeRO-3: norms of its parameter groups, joined by the caller as here; one group's norm is the joined one."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return [self._known(combine_grad_norm_groups(self._compute()))]

    def _step_in_bf16(self, *args: Any) -> None:
        """bf16 with ZeRO-1: a norm that is none makes it drop the gradients and leave, as a refused one shall."""
        from deepspeed.runtime import bf16_optimizer

        compute = bf16_optimizer.get_global_norm_of_tensors

        def known(input_tensors: list[Tensor], mpu: Any, **_: Any) -> Tensor:
            if not any(map(any, self._zero.fp32_groups_has_gradients)):
                raise RuntimeError(
                    "no parameter of this rank got a gradient in this step; the norm would be a wrong one"
                )
            norm = self._known(norm_over_model(input_tensors, mpu, self._zero.fp32_groups_flat_partition[0].device))
            return torch.full_like(norm, -1.0) if self.is_refused else norm

        bf16_optimizer.get_global_norm_of_tensors = known
        try:
            self._apply(*args)
        finally:
            bf16_optimizer.get_global_norm_of_tensors = compute

    def _known(self, norm: Tensor) -> Tensor:
        """The norm on the host, once it was asked about."""
        self._ask(float(norm))
        self._zero.overflow |= self.is_refused
        return torch.tensor(self._norm, dtype=norm.dtype)


class MegatronGuard(_Guard):
    """Stands between norm and update of megatron's optimizer."""

    def __init__(self, optimizer: Any) -> None:
        """Wraps the optimizer's norm and update, in place."""
        super().__init__()
        self._compute = optimizer.get_grad_norm
        self._apply = optimizer.step_with_ready_grads
        optimizer.get_grad_norm = self._global_norm
        optimizer.step_with_ready_grads = self._apply_if_accepted

    def _global_norm(self) -> Any:
        norm = self._compute()
        self._ask(float(norm))
        return norm

    def _apply_if_accepted(self) -> bool:
        # Names of devices are only spelt out before this; a mode that rewrites them would cost as much as the update.
        with torch._C.DisableTorchFunction():
            return not self.is_refused and bool(self._apply())
