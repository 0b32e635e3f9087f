"""Learning rates at the places that matter: first, end of warm-up, middle, last."""

import pytest

from janus_mega.config.schema import OptimizerConfig, Schedule
from janus_mega.optim.lr_schedule import learning_rate


def config(**options: object) -> OptimizerConfig:
    return OptimizerConfig(lr=2e-4, **options)


def test_warmup_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    rates = [learning_rate(step, 100, config(warmup_steps=4)) for step in range(5)]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 2e-4, 2e-4])


def test_constant_stays() -> None:
    assert {learning_rate(step, 10, config()) for step in (0, 5, 9, 20)} == {2e-4}


def test_cosine_by_hand() -> None:
    cosine = config(schedule=Schedule.cosine, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(9, 110, cosine) == pytest.approx(2e-4)
    assert learning_rate(10, 110, cosine) == pytest.approx(2e-4)
    assert learning_rate(60, 110, cosine) == pytest.approx(2e-4 * 0.55)
    assert learning_rate(35, 110, cosine) == pytest.approx(2e-4 * (0.1 + 0.9 * 0.8535534))
    assert learning_rate(110, 110, cosine) == pytest.approx(2e-5)
    assert learning_rate(500, 110, cosine) == pytest.approx(2e-5)


def test_cosine_never_rises() -> None:
    cosine = config(schedule=Schedule.cosine, warmup_steps=3)
    rates = [learning_rate(step, 50, cosine) for step in range(3, 51)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_a_stage_that_is_all_warmup() -> None:
    warmup = config(schedule=Schedule.cosine, warmup_steps=5)
    assert learning_rate(4, 5, warmup) == pytest.approx(2e-4)
    assert learning_rate(5, 5, warmup) == pytest.approx(2e-4)
