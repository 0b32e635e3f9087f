"""Groups of near hashes: the same as comparing all pairs, for every choice of tables."""

import numpy as np
import pytest

from data_pipeline.masks.near import MAX_DISTANCE, _masks, near_groups


def all_pairs(words, distance):
    """Groups by comparing everything with everything."""
    near = np.bitwise_count(words[:, None] ^ words) <= distance
    group = np.arange(len(words))
    while True:
        joined = np.where(near, group, len(words)).min(1)
        if (joined == group).all():
            return group
        group = joined


def clustered(seed, count, flips):
    """Words of which many differ in a few bits."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 1 << 64, count // 4, dtype=np.uint64)[random.integers(0, count // 4, count)]
    for _ in range(flips):
        words ^= np.uint64(1) << random.integers(0, 64, count, dtype=np.uint64)
    return words


@pytest.mark.parametrize("distance", range(MAX_DISTANCE + 1))
def test_groups_are_those_of_all_pairs(distance):
    for seed in range(3):
        words = clustered(seed, 300, 1 + distance // 2)
        found = near_groups(words, distance)
        assert found.tolist() == all_pairs(words, distance).tolist()
        assert seed or distance == 0 or (found != np.arange(300)).any()


def test_words_of_one_chunk_in_common_are_compared_all_the_same():
    words = np.arange(400, dtype=np.uint64) << np.uint64(40)  # all other bits agree: one long run in most tables
    assert near_groups(words, 3).tolist() == all_pairs(words, 3).tolist()


@pytest.mark.parametrize("count", [10, 10**6, 10**9])
@pytest.mark.parametrize("distance", [1, 4, MAX_DISTANCE])
def test_no_pair_escapes_the_tables(count, distance):
    """Whichever bits differ, some table looks at none of them."""
    random = np.random.default_rng(0)
    masks = _masks(count, distance)
    for _ in range(300):
        differing = sum(1 << int(bit) for bit in random.choice(64, distance, replace=False))
        assert any(int(mask) & differing == 0 for mask in masks)


def test_nothing_and_bounds():
    assert near_groups(np.empty(0, np.uint64), 4).tolist() == []
    assert near_groups(np.array([7, 9, 7], np.uint64), 0).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="distance 11"):
        near_groups(np.zeros(2, np.uint64), 11)
