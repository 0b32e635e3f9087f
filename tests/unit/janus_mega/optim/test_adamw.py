"""AdamW piece by piece is torch's AdamW to the last bit, and makes no temporary as long as a parameter."""

import pytest
import torch
from torch import nn

from janus_mega.optim.adamw import PIECE, PiecewiseAdamW
from tests.support.peak import AllocatedPeak

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[nn.Parameter]:
    """Longer than a piece and no multiple of one, of two dims, short, not contiguous, and without a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * PIECE + 12345,), (3, PIECE), (17,), (PIECE, 2), (5,)]
    found = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    found[3] = nn.Parameter(found[3].detach().t())
    return found


def trained(kind: type[torch.optim.Optimizer], steps: int) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    held = parameters()
    optimizer = kind([{"params": held[:2]}, {"params": held[2:], "weight_decay": 0.0}], **SETTINGS)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in held[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (-3 * (step % 3))
        optimizer.step()
    return held, optimizer


def test_weights_and_state_are_torchs_to_the_last_bit():
    expected, theirs = trained(torch.optim.AdamW, 4)
    found, ours = trained(PiecewiseAdamW, 4)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
        assert ours.state[mine].keys() == theirs.state[other].keys()
        for name, value in theirs.state[other].items():
            assert torch.equal(ours.state[mine][name], value), name
    assert float(ours.state[found[0]]["step"]) == 4


@pytest.mark.parametrize(("kind", "is_small"), [(PiecewiseAdamW, True), (torch.optim.AdamW, False)])
def test_temporaries_are_pieces(kind, is_small):
    with AllocatedPeak() as allocated:
        parameter = nn.Parameter(torch.ones(20 * PIECE))
        optimizer = kind([parameter], **SETTINGS)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # makes the moments
        with allocated.span():
            optimizer.step()
    beyond = allocated.peak_bytes - 4 * 4 * parameter.numel()
    assert (beyond < 4 * 4 * PIECE) is is_small
