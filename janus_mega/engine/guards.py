"""Asks before an optimizer's update whether the step may stand, at the moment its global gradient norm is known.

Both backends clip and update in one call; the norm exists only inside that call. So the guards wrap the function that
computes it. A refused step then leaves ZeRO by the way out that it has for overflows of fp16, taken here in any
precision and for any reason: gradients are dropped; weights, moments and the optimizer's count of updates stay. Where
there is no such way (DeepSpeed's bf16 optimizer, megatron) the update behind the norm is left out, and buffers are
cleared as after every step.
"""

import math
from collections.abc import Callable
from typing import Any

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
    """Stands between norm and update of a DeepSpeed ZeRO optimizer."""

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
            self._apply, self._link = zero.optimizer.step, zero._lazy_init_hp_params_optimizer_state
            zero.optimizer.step = self._apply_if_accepted
            zero._lazy_init_hp_params_optimizer_state = self._link_if_accepted

    def _global_norm(self, *args: Any) -> Any:
        """ZeRO-1 and 2: the norm itself."""
        norm = self._compute(*args)
        self._ask(float(norm))
        self._zero.overflow |= self.is_refused
        return norm

    def _norm_groups(self) -> Any:
        """ZeRO-3: norms of its parameter groups, joined by the caller as here."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms = self._compute()
        self._ask(float(combine_grad_norm_groups(norms)))
        self._zero.overflow |= self.is_refused
        return norms

    def _apply_if_accepted(self) -> None:
        """bf16 with ZeRO-1: AdamW's own step, behind the norm."""
        self._ask(float(self._zero._global_grad_norm))
        if not self.is_refused:
            self._apply()

    def _link_if_accepted(self) -> None:
        """What DeepSpeed does after AdamW's first step needs that there was one."""
        if not self.is_refused:
            self._link()


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
        return not self.is_refused and bool(self._apply())
