"""Weights over time and whole-numbered shares."""

import math

import numpy as np
import pytest

from data_pipeline.plan.schedule import WHOLE, WeightCurve, apportion, shares_of, size_factors
from data_pipeline.spec import Shape, WeightPoint


def point(at, weight, shape=Shape.step):
    return WeightPoint(at=at, weight=weight, shape=shape)


def test_a_weight_holds_until_its_first_point_and_from_each_point_on():
    curve = WeightCurve(5, (point(100, 2), point(200, 0)))
    assert [curve.at(time) for time in (0, 99, 100, 199, 200, 10**9)] == [5, 5, 2, 2, 0, 0]
    assert WeightCurve(3).at(10**12) == 3


def test_gradual_points_are_approached_from_the_moment_before():
    curve = WeightCurve(4, (point(100, 0, Shape.linear), point(200, 0), point(300, 8, Shape.cosine)))
    assert [curve.at(time) for time in (0, 25, 50, 100, 150, 200, 300)] == [4, 3, 2, 0, 0, 0, 8]
    for time in np.linspace(200, 300, 41).tolist():
        assert curve.at(time) == pytest.approx(4 - 4 * math.cos(math.pi * (time - 200) / 100), abs=1e-12)


def test_whether_a_weight_is_changing():
    curve = WeightCurve(4, (point(100, 0, Shape.linear), point(200, 1), point(300, 8, Shape.cosine)))
    assert [curve.is_changing(time) for time in (0, 99, 100, 199, 200, 299, 300)] == [1, 1, 0, 0, 1, 1, 0]
    assert not WeightCurve(4, (point(100, 0),)).is_changing(50)
    assert WeightCurve(0, (point(5, 1),)).is_used
    assert not WeightCurve(0, (point(5, 0),)).is_used


@pytest.mark.parametrize("weights", [(5, 3, 2), (1, 1, 1), (0.1, 0.7, 0, 1e-15), tuple(range(1, 40)), (1e300, 1e-300)])
def test_shares_sum_to_the_whole_and_are_right_to_a_trillionth(weights):
    shares = shares_of(weights)
    assert sum(shares) == WHOLE
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * WHOLE) <= 1
        assert share == 0 or weight > 0


def test_simple_shares_are_exact():
    assert shares_of([5, 3, 2]) == (5 * WHOLE // 10, 3 * WHOLE // 10, 2 * WHOLE // 10)
    assert shares_of([0.3, 0.7]) == (3 * WHOLE // 10, 7 * WHOLE // 10)
    assert shares_of([0, 0]) == (0, 0)


def test_temperature_lies_between_equal_and_proportional_to_size():
    sizes = (1000.0, 10.0)
    assert size_factors(sizes, 0) == (1, 1)
    assert size_factors(sizes, 1) == pytest.approx((1, 0.01))
    assert size_factors(sizes, 2) == pytest.approx((1, 0.1))
    assert size_factors(sizes, 1e6) == pytest.approx((1, 1), abs=1e-4)


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_whole_numbers_next_to_what_is_owed(total):
    random = np.random.default_rng(total)
    for _ in range(50):
        shares = shares_of(random.dirichlet(np.ones(5)).tolist())
        counts = apportion([share * total for share in shares], total)
        assert sum(counts) == total
        assert all(abs(count * WHOLE - share * total) < WHOLE for count, share in zip(counts, shares, strict=True))
    assert apportion([-5 * WHOLE, 8 * WHOLE], 3) == [0, 3]
