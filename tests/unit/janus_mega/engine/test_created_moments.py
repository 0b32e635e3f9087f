"""Optimizer state that is made for a resumed run: updates are counted where the optimizer counts them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from janus_mega.engine.megatron_backend import _create_moments

STEPS = 3
BETAS = (0.9, 0.95)


class CountsPerGroup(torch.optim.Optimizer):
    """AdamW's update as fused kernels make it: one count for a group, which begins at 1 where there is none."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3, "betas": BETAS, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(parameter.grad, 1 - BETAS[0])
                square.lerp_(parameter.grad.square(), 1 - BETAS[1])
                corrected = mean / (1 - BETAS[0] ** group["step"])
                root = (square / (1 - BETAS[1] ** group["step"])).sqrt()
                parameter -= group["lr"] * corrected / (root + group["eps"])


def updated(make: Callable[[Any], torch.optim.Optimizer]) -> torch.Tensor:
    """A weight after one more update, as a resumed run makes it after STEPS."""
    weight = nn.Parameter(torch.linspace(-1, 1, 8))
    optimizer = make([weight])
    _create_moments(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weight][moment].copy_(torch.rand(8, generator=generator))
    weight.grad = torch.randn(8, generator=generator)
    optimizer.step()
    return weight.detach()


def test_both_ways_of_counting_give_the_same_update() -> None:
    per_parameter = updated(lambda weights: torch.optim.AdamW(weights, lr=1e-3, betas=BETAS, weight_decay=0.0))
    torch.testing.assert_close(updated(CountsPerGroup), per_parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [torch.optim.AdamW, CountsPerGroup])
def test_a_count_stands_where_the_optimizer_looks(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = make([weight])
    _create_moments(optimizer, STEPS)
    (group,) = optimizer.param_groups
    counts = (group.get("step"), optimizer.state[weight].get("step"))
    assert counts == ((None, STEPS) if make is torch.optim.AdamW else (STEPS, None))
