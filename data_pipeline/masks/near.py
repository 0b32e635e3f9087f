"""Groups of 64-bit hashes that differ in a few bits, without comparing all pairs.

Two words that differ in at most `d` bits agree wholly in at least `k` of `d + k` chunks of their bits (pigeonhole). So
the words are sorted by every choice of `k` chunks, and only those that agree there are compared: nothing is missed, and
what is left to compare is a handful per word. `k` is chosen by the number of words. Pairs join groups transitively (A
is near B, B is near C: one group), which keeps the result independent of the order of the words.
"""

import math
from itertools import combinations, pairwise

import numpy as np

MAX_DISTANCE = 10
"""Beyond this many of 64 bits, different pictures are taken for one, and the search grows slow."""

_WORD_BITS = 64
_SORT_COST, _PAIR_COST = 150.0, 12.0
"""Nanoseconds per word and table, and per pair compared; they only steer the choice of `k`."""


def near_groups(words: np.ndarray, distance: int) -> np.ndarray:
    """Groups words by Hamming distance.

    Args:
        words: uint64 [n].
        distance: Most bits in which two words of a pair differ, 0 to MAX_DISTANCE.

    Returns:
        int64 [n]: for every word, the number of the first word of its group.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance} is not within 0 to {MAX_DISTANCE}")
    values, first, value_of = np.unique(words, return_index=True, return_inverse=True)
    root = np.arange(len(values))
    if distance and len(values) > 1:
        for mask in _masks(len(values), distance):
            root = _join_near(values, mask, distance, root)
    # The first word of a group is the least of the first places of its values.
    earliest = np.full(len(values), len(words), np.int64)
    np.minimum.at(earliest, root, first)
    return earliest[root][value_of]


def _masks(num_words: int, distance: int) -> list[np.uint64]:
    """For every table, the bits that words must agree in to be compared."""

    def cost(num_agreeing: int) -> float:
        num_chunks = distance + num_agreeing
        pairs_per_word = num_words / 2 ** (_WORD_BITS * num_agreeing / num_chunks + 1)
        return math.comb(num_chunks, num_agreeing) * (_SORT_COST + pairs_per_word * _PAIR_COST)

    num_agreeing = min(range(1, 5), key=cost)
    num_chunks = distance + num_agreeing
    borders = [_WORD_BITS * chunk // num_chunks for chunk in range(num_chunks + 1)]
    chunks = [(1 << end) - (1 << start) for start, end in pairwise(borders)]
    return [np.uint64(sum(chosen)) for chosen in combinations(chunks, num_agreeing)]


def _join_near(values: np.ndarray, mask: np.uint64, distance: int, root: np.ndarray) -> np.ndarray:
    """Compares the values that agree under the mask and joins the groups of those that are near."""
    keys = values & mask
    order = np.argsort(keys)
    keys, ordered = keys[order], values[order]
    # Round s compares every value with the s-th after it, as long as both agree under the mask.
    at = np.flatnonzero(keys[1:] == keys[:-1])
    step = 1
    while len(at):
        near = np.bitwise_count(ordered[at] ^ ordered[at + step]) <= distance
        if near.any():
            root = _joined(root, order[at[near]], order[at[near] + step])
        step += 1
        at = at[at + step < len(keys)]
        at = at[keys[at] == keys[at + step]]
    return root


def _joined(root: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Joins the groups of pairs; a group's root is its least member, and every member points straight at it."""
    while True:
        one, other = root[left], root[right]
        apart = one != other
        if not apart.any():
            return root
        left, right = left[apart], right[apart]
        one, other = one[apart], other[apart]
        root = root.copy()
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while True:
            shorter = root[root]
            if (shorter == root).all():
                break
            root = shorter
