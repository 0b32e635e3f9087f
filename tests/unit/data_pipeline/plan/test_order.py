"""Counter-based order: fixed for ever, a permutation, independent between streams."""

import numpy as np
import pytest

from data_pipeline.plan.order import choice_keys, counter_keys, happens, permutation, stream_key, unit_interval

GOLDEN_CHOICES = ["0x76f38fbcc8b77c9a", "0xe9be511b805b7620", "0xbca291199768675e"]


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


@pytest.mark.parametrize("uids", ["random", "counted"])
def test_choices_fall_evenly_and_independently(uids):
    """Uids may be hashes or, from others' lists, mere counters; purposes and epochs must not depend on each other."""
    count = 4000
    words = np.random.default_rng(0).integers(0, 1 << 63, (count, 2), dtype=np.uint64)
    if uids == "counted":
        words = np.stack([np.zeros(count, np.uint64), np.arange(count, dtype=np.uint64)], 1)
    first = choice_keys(stream_key("guidance", 0), words, np.zeros(count, np.int64))
    later = choice_keys(stream_key("guidance", 0), words, np.ones(count, np.int64))
    other = choice_keys(stream_key("variant", 0), words, np.zeros(count, np.int64))
    for keys in (first, later, other):
        assert happens(keys, 0.1).mean() == pytest.approx(0.1, abs=0.02)
        assert np.bincount((keys % np.uint64(5)).astype(int)) == pytest.approx(np.full(5, count / 5), abs=120)
    for keys in (later, other):
        assert (happens(first, 0.3) & happens(keys, 0.3)).mean() == pytest.approx(0.09, abs=0.02)
    assert not happens(first, 0.0).any() and happens(first, 1.0).all()


def test_a_choice_knows_nothing_of_its_company():
    words = np.array([[1, 2], [3, 4], [(1 << 64) - 1, 5]], np.uint64)
    together = choice_keys(7, words, np.array([0, 1, 2]))
    alone = [int(choice_keys(7, words[i : i + 1], np.array([i]))[0]) for i in range(3)]
    assert together.tolist() == alone
    assert [hex(key) for key in together] == GOLDEN_CHOICES, "another machine must choose the same"
