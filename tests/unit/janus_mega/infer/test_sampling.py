"""Ids from logits: greedy, and frequencies that follow the distribution."""

import torch

from janus_mega.infer.sampling import choose


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 1.0, 1.0, 1.0]])
    assert choose(logits, 0.0, torch.tensor([0.9, 0.9])).tolist() == [1, 0]


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, -30.0])
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 3.0):
        ids = choose(logits.expand(count, -1), temperature, uniform)
        seen = torch.bincount(ids, minlength=5) / count
        assert torch.allclose(seen, (logits / temperature).softmax(-1), atol=0.01)


def test_ends_of_the_unit_interval_stay_in_range_and_off_impossible_ids() -> None:
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]] * 2)
    assert choose(logits, 1.0, torch.tensor([0.0, 1.0 - 2**-24])).tolist() == [1, 2]
