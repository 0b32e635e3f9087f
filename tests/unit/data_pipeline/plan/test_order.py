"""Counter-based order: fixed for ever, a permutation, independent between streams."""

import numpy as np
import pytest

from data_pipeline.plan.order import counter_keys, permutation, stream_key, unit_interval


def test_keys_are_splitmix64():
    """The published first outputs of splitmix64 seeded with 0: another machine must find the same."""
    assert [hex(key) for key in counter_keys(0, 3)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_stream_key_is_fixed():
    assert stream_key("order", 0, "text", 3) == stream_key("order", 0, "text", 3)
    assert stream_key("order", 0, "text", 3) != stream_key("order", 0, "text", 4)
    assert stream_key("ab", "c") != stream_key("a", "bc")
    assert stream_key("golden") == 5434833403847302432


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_holds_everything_once(count):
    assert sorted(permutation(7, count).tolist()) == list(range(count))


def test_appended_samples_leave_the_order_of_the_others():
    before, after = permutation(7, 1000), permutation(7, 1300)
    assert after[after < 1000].tolist() == before.tolist()


def test_orders_of_neighbouring_keys_are_unrelated():
    first, second = permutation(7, 2000), permutation(8, 2000)
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert abs(np.corrcoef(first, np.arange(2000))[0, 1]) < 0.1


def test_unit_interval_is_uniform():
    values = np.array([unit_interval("guidance", 0, f"t2i:{i}", 0) for i in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs((values < 0.1).mean() - 0.1) < 0.02
    assert abs(values.mean() - 0.5) < 0.02
