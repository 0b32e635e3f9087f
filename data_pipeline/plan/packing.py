"""Packs documents into rows without splitting any: two greedy methods, the better one wins.

Best fit decreasing is good where lengths differ widely and there is much text to fill gaps with (0.2 % of padding at
4096) and poor elsewhere: documents of 28 to 60 tokens leave a gap below 28 in every row of 256, some 5 %; images with
captions alone leave 4 to 8 % at 4096. There, rows are filled to sums that the documents left can reach exactly, and
the few rows at the end that came out badly are packed anew among others (below 0.1 % in both examples).
Bit masks keep it at 1 to 5 us a document in plain Python: bit `i` of an int stands for length, sum or room `i`, and one
shift tests all of them at once. Everything is a function of the lengths and their order alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_GOOD_ENOUGH = 2000
"""More is tried while more than one token in this many is padding."""
_MAX_TABLE = 1 << 24
"""Filling exactly costs about distinct lengths x capacity; above this only best fit is used."""
_LOOK_AHEAD = 32
"""Documents that may wait for a row they suit before a less typical one is taken."""
_MENDINGS = 12
_MENDED_WORST = 64
_MENDED_OTHERS = 64
"""How often bins are packed anew, how many of the emptiest, and how many others beside them for variety."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Which bin (later: row) each document went to."""

    bin_of: np.ndarray
    """int64 [documents]."""
    num_bins: int


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """Packs documents of `lengths` (int, 1 ... capacity; in arrival order) into few bins of `capacity` tokens."""
    order = np.argsort(-lengths, kind="stable")
    placed, num_bins = best_fit(lengths[order].tolist(), capacity)
    total = int(lengths.sum())
    small_table = len(np.unique(lengths)) * capacity <= _MAX_TABLE
    if small_table and not _is_good(num_bins, total, capacity):
        as_list = lengths.tolist()
        bins = _mend(_as_bins(*fill_exactly(as_list, capacity)), as_list, capacity)
        if len(bins) < num_bins:
            return _as_packing(bins, len(lengths))
    bin_of = np.empty(len(lengths), np.int64)
    bin_of[order] = placed
    return Packing(bin_of, num_bins)


def _is_good(num_bins: int, total: int, capacity: int) -> bool:
    """Whether there is little left to gain: no bin, or next to no padding."""
    waste = num_bins * capacity - total
    return waste < capacity or waste * _GOOD_ENOUGH <= total


def _as_bins(placed: list[int], num_bins: int) -> list[list[int]]:
    """Documents of every bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for document, bin_no in enumerate(placed):
        bins[bin_no].append(document)
    return bins


def _as_packing(bins: list[list[int]], num_documents: int) -> Packing:
    bin_of = np.empty(num_documents, np.int64)
    for bin_no, documents in enumerate(bins):
        bin_of[documents] = bin_no
    return Packing(bin_of, len(bins))


def _mend(bins: list[list[int]], lengths: list[int], capacity: int) -> list[list[int]]:
    """Packs the emptiest bins anew together with some others, as long as that saves bins.

    Greedy filling ends with documents that suit each other badly; among others they find partners.
    """
    total = sum(lengths)
    in_vain = 0
    for attempt in range(_MENDINGS):
        if in_vain > 1 or _is_good(len(bins), total, capacity):
            break
        bins.sort(key=lambda documents: sum([lengths[document] for document in documents]))
        _gather_gaps(bins, lengths, capacity)
        stride = max(1, (len(bins) - _MENDED_WORST) // _MENDED_OTHERS)
        chosen = [*range(_MENDED_WORST), *range(_MENDED_WORST + attempt % stride, len(bins), stride)]
        chosen = [number for number in chosen[: _MENDED_WORST + _MENDED_OTHERS] if number < len(bins)]
        documents = _by_turns([bins[number] for number in chosen])
        placed, num_bins = fill_exactly([lengths[document] for document in documents], capacity)
        in_vain = 0 if num_bins < len(chosen) else in_vain + 1
        if num_bins <= len(chosen):
            out = set(chosen)
            bins = [kept for number, kept in enumerate(bins) if number not in out]
            bins += [[documents[at] for at in held] for held in _as_bins(placed, num_bins)]
    return bins


def _gather_gaps(bins: list[list[int]], lengths: list[int], capacity: int) -> None:
    """Fills small gaps with slightly longer documents of the emptiest bins, which get the shorter ones and the room."""
    donors: dict[int, list[tuple[int, int]]] = {}
    mask = 0
    for number, documents in enumerate(bins[:_MENDED_WORST]):
        for at, document in enumerate(documents):
            donors.setdefault(lengths[document], []).append((number, at))
            mask |= 1 << lengths[document]
    for documents in bins[_MENDED_WORST:]:
        gap = capacity - sum([lengths[document] for document in documents])
        while gap:
            best, best_at = 0, -1
            for at, document in enumerate(documents):
                length = lengths[document]
                gain = (mask & ((2 << (length + gap)) - 1)).bit_length() - 1 - length
                if gain > best:
                    best, best_at = gain, at
            if best_at < 0:
                break
            document = documents[best_at]
            short, long = lengths[document], lengths[document] + best
            number, at = donors[long].pop()
            if not donors[long]:
                mask ^= 1 << long
            documents[best_at], bins[number][at] = bins[number][at], document
            donors.setdefault(short, []).append((number, at))
            mask |= 1 << short
            gap -= best


def _by_turns(bins: list[list[int]]) -> list[int]:
    """All documents of the emptiest bins, then those of the others, one of each bin in turn."""
    worst, others = bins[:_MENDED_WORST], bins[_MENDED_WORST:]
    documents = [document for documents in worst for document in documents]
    for turn in range(max(map(len, others), default=0)):
        documents += [held[turn] for held in others if turn < len(held)]
    return documents


class Rooms:
    """Bins by the room left in them; finds the tightest that a document fits in."""

    def __init__(self, capacity: int) -> None:
        self._bins: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._mask = 0

    def add(self, bin_no: int, room: int) -> None:
        """Offers a bin with `room` tokens left."""
        if room:
            self._bins[room].append(bin_no)
            self._mask |= 1 << room

    def take(self, length: int) -> int:
        """Puts a document into the tightest bin with room for it and returns that bin, or -1 if there is none."""
        fitting = self._mask >> length
        if not fitting:
            return -1
        room = length + (fitting & -fitting).bit_length() - 1
        bin_no = self._bins[room].pop()
        if not self._bins[room]:
            self._mask ^= 1 << room
        self.add(bin_no, room - length)
        return bin_no


def best_fit(lengths: Iterable[int], capacity: int) -> tuple[list[int], int]:
    """Puts each document, in the order given, where the least room remains; opens a bin where none fits.

    Returns:
        The bin of every document and the number of bins.
    """
    # `Rooms` written out: the calls would double the time.
    bins: list[list[int]] = [[] for _ in range(capacity + 1)]
    bits = [1 << room for room in range(capacity + 1)]
    mask = 0
    placed = []
    num_bins = 0
    for length in lengths:
        fitting = mask >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = bins[room]
            bin_no = stack.pop()
            if not stack:
                mask ^= bits[room]
            room -= length
        else:
            bin_no, num_bins = num_bins, num_bins + 1
            room = capacity - length
        if room:
            stack = bins[room]
            if not stack:
                mask |= bits[room]
            stack.append(bin_no)
        placed.append(bin_no)
    return placed, num_bins


def fill_exactly(lengths: list[int], capacity: int) -> tuple[list[int], int]:
    """Fills bin after bin to the highest sum that the lengths at hand can reach.

    A document is taken only if the rest of its bin stays reachable, the last one is looked up by its length. Documents
    are taken as they arrive as far as possible, so what is left keeps the proportions of the whole.

    Returns:
        The bin of every document and the number of bins.
    """
    stock = _Stock(lengths, capacity)
    placed = [0] * len(lengths)
    num_bins = 0
    while stock.present:
        room = stock.reachable_up_to(capacity)
        while room > 0:
            if stock.present >> room & 1:
                document = stock.take_out_of_turn(room)
            else:
                fitting = stock.fitting(room)
                if not fitting:
                    room = stock.lower(room)
                    continue
                document = stock.take_next(fitting)
            placed[document] = num_bins
            room -= lengths[document]
        num_bins += 1
    return placed, num_bins


class _Stock:
    """Documents not yet packed: by length, in arrival order, and which sums they can make."""

    def __init__(self, lengths: list[int], capacity: int) -> None:
        self._capacity = capacity
        self._by_length: dict[int, list[int]] = {}
        for document in range(len(lengths) - 1, -1, -1):
            self._by_length.setdefault(lengths[document], []).append(document)
        self.present = 0
        """Bit i: there is a document of i tokens."""
        for length in self._by_length:
            self.present |= 1 << length
        self._arrivals: Iterator[int] = iter(lengths)
        self._waiting: list[int] = []
        self._taken_early = dict.fromkeys(self._by_length, 0)
        self._stale = False
        self._refresh()

    def _refresh(self) -> None:
        """Computes the sums that the lengths at hand can make, as if there were any number of each."""
        everything = (2 << self._capacity) - 1
        sums = 1
        for length in sorted(self._by_length):
            if length >= (everything ^ sums).bit_length():
                break  # every higher sum is there already
            step = length
            while step <= self._capacity:
                sums |= (sums << step) & everything
                step *= 2
        self._sums = sums
        # Mirrored, so that one shift answers for which lengths l the sum room - l is reachable.
        self._mirror = int(format(sums, f"0{self._capacity + 1}b")[::-1], 2)
        self._stale = False

    def reachable_up_to(self, room: int) -> int:
        """The highest sum within `room` that the documents may reach."""
        return (self._sums & ((2 << room) - 1)).bit_length() - 1

    def fitting(self, room: int) -> int:
        """Bit mask of present lengths that leave a reachable rest."""
        return (self._mirror >> (self._capacity - room)) & self.present

    def lower(self, room: int) -> int:
        """The next sum to try after `room` proved out of reach."""
        if self._stale:
            self._refresh()
            return self.reachable_up_to(room)
        return self.reachable_up_to(room - 1)

    def take_out_of_turn(self, length: int) -> int:
        """Removes and returns a document of this length, ahead of its turn."""
        self._taken_early[length] += 1
        return self._remove(length)

    def take_next(self, fitting: int) -> int:
        """Removes and returns the next document in arrival order whose length is in `fitting`."""
        waiting = self._waiting
        for at, length in enumerate(waiting):
            if fitting >> length & 1:
                del waiting[at]
                return self._remove(length)
        for length in self._arrivals:
            if self._taken_early[length]:
                self._taken_early[length] -= 1
            elif fitting >> length & 1:
                return self._remove(length)
            else:
                waiting.append(length)
                if len(waiting) > _LOOK_AHEAD:
                    del waiting[0]
                    break
        return self._remove(fitting.bit_length() - 1)

    def _remove(self, length: int) -> int:
        documents = self._by_length[length]
        document = documents.pop()
        if not documents:
            del self._by_length[length]
            self.present ^= 1 << length
            self._stale = True
        return document
