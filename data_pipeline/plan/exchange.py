"""Packs by exchange: deals documents over just enough bins and swaps them until no bin holds more than it may.

Greedy packing takes what fits best and is left with documents that suit nothing: drawings of 600 tokens go six to a row
of 4096 and leave 500 open once the texts that could fill them are gone. Here all bins start with a like mix, some of
them too full. A bin in excess swaps a document with another bin where that lowers the excess of both together, and
where nothing does it hands its excess on to a bin of another make-up. That settles mixes of narrow lengths within a
thousandth of their volume; where lengths leave gaps whatever one does, bins are added until the excess is gone.
All pairs of documents of some thousand pairs of bins are one numpy expression, so a document costs about a microsecond.
Only integers and stable sorts: the result is a function of the lengths and their order.
"""

from dataclasses import dataclass

import numpy as np

_SPARE = 3000
"""Bins to begin with: the volume and one in this many."""
_MAX_ROUNDS = 176
_LOOK_BACK = 16
_FALL = 60
"""Every so many rounds bins are added, unless the excess has fallen to this percentage."""
_ADDED = 3000
"""The n-th time n bins in this many are added, and as many as the excess would fill."""
_SLIGHT = 256
_STUCK = 2
"""Where excess hardly falls though it is slight (below the capacity by this factor), no lengths are left that differ by
little; then bins are added for one document of every so many bins in excess."""
_FEW = 4
"""So many bins in excess or fewer are not worth that: their documents are put elsewhere one by one."""
_PAIRS = 2048
"""Pairs of bins looked at in a round while many bins are in excess."""
_FEW_PAIRS = 512
"""The same when few are; each of them then looks at several others."""
_PARTNERS = 8
"""Bins that a bin in excess looks at in a round, if `_PAIRS` allows it."""
_SLOTS = 8
"""Documents of a bin looked at in a round; the next round looks at others."""
_HAND_ON_FROM = 4
"""From this round on every other one hands excess on."""
_TOLERANCES = (32, 16, 8)
"""By how many tokens excess may grow when handed on; one value for every 24 rounds, the last for all that follow."""
_LAST_FEW = 16
_LAST_TOLERANCE = 64
"""So many bins in excess or fewer may let it grow by this much: the odd long document must move to where it suits."""


def exchange(lengths: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Packs documents of `lengths` (int [documents], 1 ... capacity) into few bins of `capacity` tokens.

    Args:
        lengths: Tokens of each document; at least one.
        order: Their numbers, longest first.
        capacity: Tokens that a bin holds.

    Returns:
        int64 [documents], the bin of every document, and the number of bins.
    """
    volume = -(-int(lengths.sum()) * (_SPARE + 1) // (capacity * _SPARE))
    bins = _deal(lengths, order, capacity, max(volume, least_bins(lengths[order[::-1]], capacity)))
    _settle(bins)
    _evict(bins)
    bin_no, slot = np.nonzero(bins.length)
    in_use = bins.length.any(axis=1)
    bin_of = np.empty(len(lengths), np.int64)
    bin_of[bins.document[bin_no, slot]] = (np.cumsum(in_use) - 1)[bin_no]
    return bin_of, int(in_use.sum())


def least_bins(ascending: np.ndarray, capacity: int) -> int:
    """Bins needed at the least: documents longer than capacity / (k + 1) go at most k to a bin."""
    most = np.arange(1, min(64, capacity // max(int(ascending[0]), 1)) + 1)
    longer = len(ascending) - np.searchsorted(ascending, capacity // (most + 1), side="right")
    return int((-(-longer // most)).max())


@dataclass(slots=True)
class _Bins:
    """Bins with slots for documents; an empty slot holds a document of no tokens, so a move is a swap too."""

    capacity: int
    length: np.ndarray
    """int [bins, slots], tokens of the documents."""
    document: np.ndarray
    """int64 [bins, slots], which documents they are; -1 in empty slots."""
    excess: np.ndarray
    """int [bins], tokens above the capacity; negative where there is room."""

    def swap(self, bins: tuple[np.ndarray, np.ndarray], slots: tuple[np.ndarray, np.ndarray]) -> None:
        """Swaps documents between pairs of bins; no bin may occur twice."""
        here, there = (bins[0], slots[0]), (bins[1], slots[1])
        moved = self.length[here] - self.length[there]
        self.excess[bins[0]] -= moved
        self.excess[bins[1]] += moved
        for array in (self.length, self.document):
            array[here], array[there] = array[there], array[here]

    def add(self, count: int) -> None:
        """Adds empty bins."""
        slots = self.length.shape[1]
        self.length = np.concatenate([self.length, np.zeros((count, slots), self.length.dtype)])
        self.document = np.concatenate([self.document, np.full((count, slots), -1, np.int64)])
        self.excess = np.concatenate([self.excess, np.full(count, -self.capacity, self.excess.dtype)])


def _deal(lengths: np.ndarray, order: np.ndarray, capacity: int, num_bins: int) -> _Bins:
    """Deals documents, longest first, half a round at a time to the half of the bins that holds least."""
    load = np.zeros(num_bins, np.int64)
    bin_of = np.empty(len(lengths), np.int64)
    half = max(1, num_bins // 2)
    for first in range(0, len(order), half):
        dealt = order[first : first + half]
        to = np.argsort(load, kind="stable")[: len(dealt)]
        bin_of[dealt] = to
        load[to] += lengths[dealt]
    held = np.bincount(bin_of, minlength=num_bins)
    by_bin = np.argsort(bin_of, kind="stable")
    bin_no = bin_of[by_bin]
    slot = np.arange(len(by_bin)) - (np.cumsum(held) - held)[bin_no]
    # Costs of swaps are below 4 x capacity^2, see `_find`.
    dtype = np.int32 if capacity < 1 << 14 else np.int64
    shape = (num_bins, int(held.max()) + 1)
    bins = _Bins(capacity, np.zeros(shape, dtype), np.full(shape, -1, np.int64), (load - capacity).astype(dtype))
    bins.length[bin_no, slot] = lengths[by_bin]
    bins.document[bin_no, slot] = by_bin
    return bins


def _settle(bins: _Bins) -> None:
    """Swaps until no bin is in excess, adding bins where that gets nowhere."""
    num_documents = int(np.count_nonzero(bins.length))
    before = times_added = 0
    for round_no in range(_MAX_ROUNDS):
        over = np.flatnonzero(bins.excess > 0)
        if not len(over):
            return
        if round_no % _LOOK_BACK == 0:
            amount = int(bins.excess[over].sum())
            if before > 0 and 100 * amount > _FALL * before:
                if len(over) <= _FEW:
                    return
                times_added += 1
                more = times_added * len(bins.excess) // _ADDED + amount // bins.capacity
                if 10 * amount > 9 * before and amount * _SLIGHT < len(over) * bins.capacity:
                    more = max(more, len(over) * len(bins.excess) // (_STUCK * num_documents))
                bins.add(max(1, more))
            before = amount
        if round_no >= _HAND_ON_FROM and round_no % 2 == 0:
            tolerance = _TOLERANCES[min(round_no // 24, len(_TOLERANCES) - 1)]
            tolerance = _LAST_TOLERANCE if len(over) <= _LAST_FEW else tolerance
            _round(bins, over, np.flatnonzero(bins.excess <= 0), round_no, tolerance)
        else:
            _round(bins, over, np.flatnonzero(bins.excess < 0), round_no, None)


def _round(bins: _Bins, over: np.ndarray, others: np.ndarray, round_no: int, tolerance: int | None) -> None:
    """Looks at pairs of a bin in excess and another bin and makes the best swap of each where it helps."""
    if not len(others):
        return
    if round_no % 4 == 0 or round_no < 3:
        over = over[np.argsort(-bins.excess[over], kind="stable")]
        if tolerance is None:
            others = others[np.argsort(bins.excess[others], kind="stable")]
    # The most room for the most excess in the first rounds; then others every time.
    start = len(others) * (round_no * 618 % 1000) // 1000 if round_no > 2 else 0
    partners = max(1, min(max(_FEW_PAIRS // len(over), _PARTNERS), _PAIRS // len(over), len(others)))
    if partners == 1:
        count = min(len(over), len(others), _PAIRS)
        first = np.roll(over, -(round_no * count) % len(over))[:count]
        second = others[(np.arange(count) + start) % len(others)]
    else:
        spread = np.arange(partners) * len(others) // partners
        first = np.repeat(over, partners)
        second = others[(np.arange(len(over))[:, None] + spread + start) % len(others)].reshape(-1)
    slots = np.arange(bins.length.shape[1])
    if len(slots) > _SLOTS:
        every = np.arange(_SLOTS) * len(slots) // _SLOTS
        slots, second_slots = (every + round_no) % len(slots), (every + round_no // 3) % len(slots)
    else:
        second_slots = slots
    gain, best = _find(bins, (first, second), (slots, second_slots), tolerance)
    gain = gain.reshape(-1, partners)
    chosen = np.arange(len(gain)) * partners + gain.argmax(axis=1)
    gain = gain.reshape(-1)
    chosen = chosen[gain[chosen] > 0]
    chosen = chosen[np.argsort(-gain[chosen], kind="stable")]
    chosen = chosen[np.unique(second[chosen], return_index=True)[1]]
    at, second_at = np.divmod(best[chosen], len(second_slots))
    bins.swap((first[chosen], second[chosen]), (slots[at], second_slots[second_at]))


def _find(
    bins: _Bins, pairs: tuple[np.ndarray, np.ndarray], slots: tuple[np.ndarray, np.ndarray], tolerance: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The best swap of every pair: the one that leaves least excess; among equals the one that moves least.

    A tolerance asks for swaps that settle the first bin and leave the second no more than it and the tolerance.

    Returns:
        Its gain (positive if it should be made) and its number, slot of the first bin x slots + slot of the second.
    """
    first, second = pairs
    scale = 1 << bins.capacity.bit_length()
    excess, room = bins.excess[first], -bins.excess[second]
    # What is moved beyond the excess of the first bin, [pairs, slots x slots]; negative if excess remains.
    offered = bins.length.take(first, axis=0).take(slots[0], axis=1) - excess[:, None]
    asked = bins.length.take(second, axis=0).take(slots[1], axis=1)
    beyond = (offered[:, :, None] - asked[:, None, :]).reshape(len(first), -1)
    cost = beyond - (room - excess)[:, None]
    np.maximum(cost, 0, out=cost)
    if tolerance is None:
        bound = excess * scale
        left = np.minimum(beyond, 0)
        cost -= left
        beyond -= left
        cost *= scale
        cost += beyond
    else:
        bound = (excess + tolerance + 1) * scale
        cost *= scale
        cost += beyond
        # Masks are slow: a negative number shifted to its sign has all bits set.
        bits = 8 * beyond.itemsize
        beyond >>= bits - 1
        beyond &= 1 << (bits - 2)
        cost += beyond
    best = cost.argmin(axis=1)
    return bound - cost[np.arange(len(first)), best], best


def _evict(bins: _Bins) -> None:
    """Takes one document out of every bin still in excess, or more, and gives them bins of their own."""
    evicted: list[tuple[int, int, int]] = []
    for bin_no in np.flatnonzero(bins.excess > 0).tolist():
        while bins.excess[bin_no] > 0:
            held, excess = bins.length[bin_no], bins.excess[bin_no]
            fitting = held[held >= excess]
            slot = int(np.flatnonzero(held == (fitting.min() if len(fitting) else held.max()))[0])
            evicted.append((int(held[slot]), int(bins.document[bin_no, slot]), bin_no))
            bins.excess[bin_no] -= held[slot]
            bins.length[bin_no, slot], bins.document[bin_no, slot] = 0, -1
    for length, document, _ in sorted(evicted, key=lambda taken: (-taken[0], taken[1])):
        fitting = np.flatnonzero((bins.excess <= -length) & (bins.length == 0).any(axis=1))
        if not len(fitting):
            bins.add(1)
            fitting = np.array([len(bins.excess) - 1])
        bin_no = fitting[bins.excess[fitting].argmax()]
        slot = int(np.flatnonzero(bins.length[bin_no] == 0)[0])
        bins.length[bin_no, slot], bins.document[bin_no, slot] = length, document
        bins.excess[bin_no] += length
