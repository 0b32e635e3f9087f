"""Weighted means, sums, last values, and one read per interval."""

import torch

from janus_mega.observe.metrics import MetricAccumulator


def test_values_of_each_kind():
    metrics = MetricAccumulator()
    metrics.mean("loss", torch.tensor(2.0), weight=torch.tensor(3))
    metrics.mean("loss", 4.0, weight=1)
    metrics.sum("tokens", 10)
    metrics.sum("tokens", torch.tensor(5))
    metrics.last("lr", 0.1)
    metrics.last("lr", 0.2)
    assert metrics.read() == {"loss": 2.5, "tokens": 15.0, "lr": 0.2}


def test_reading_forgets_and_empty_means_are_left_out():
    metrics = MetricAccumulator()
    metrics.mean("loss", 1.0)
    metrics.read()
    metrics.mean("generation", torch.tensor(0.0), weight=torch.tensor(0))
    assert metrics.read() == {}


def test_gradients_are_not_kept_and_small_values_are_not_lost():
    metrics = MetricAccumulator()
    weight = torch.ones((), requires_grad=True)
    metrics.sum("count", weight * 16_777_216.0)
    metrics.sum("count", torch.tensor(1.0))
    assert metrics.read() == {"count": 16_777_217.0}
