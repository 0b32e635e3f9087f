"""Fills the rows of one window with documents: how many of each source, and which row each goes to.

Where shares count tokens or samples, rows hold documents of all sources (rows of one source alone waste several
percent): about as many tokens are taken as the window before could hold, packed, and the rows topped up. Where they
count rows, every source packs its own. Every document taken is placed, so the state after a window is the ledger and
how full rows became.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.mixture import Account, Ledger, Mixture, Upcoming
from data_pipeline.plan.packing import Rooms, pack
from data_pipeline.plan.schedule import apportion

_SLACK = 500
"""One row in so many is left to topping up where rows belong to one source."""


@dataclass(frozen=True, slots=True)
class Filling:
    """Documents of a window and where they are; bins become rows once they are dealt."""

    bins: list[np.ndarray]
    """Per source, int64: the bin of each of its next documents."""
    ledger: Ledger
    """After the window."""
    shares: tuple[int, ...]
    """Shares of the window in 1/WHOLE; 0 for sources that gave their last documents without reaching theirs."""
    fullness: tuple[int, ...]
    """Tokens that rows of this kind hold, for the window after: one number for all rows, or one for each source."""


@dataclass(frozen=True, slots=True)
class Space:
    """What there is to fill."""

    num_rows: int
    seq_len: int

    def just_below(self, tokens: int) -> int:
        """A little less than what fits, so that all of it finds a place; the rest is topped up one by one.

        Where much of the rows stays empty whatever one does, how much varies, and packing anew costs more.
        """
        whole = self.num_rows * self.seq_len
        return max(self.seq_len, tokens - 3 * self.seq_len // 2 - min(max(0, whole - tokens) // 3, whole // 1000))


# ---- rows that all sources share ---------------------------------------------------------------------------------


def fill_shared_rows(
    ledger: Ledger, fullness: Sequence[int], upcoming: Sequence[Upcoming], mixture: Mixture, time: float, space: Space
) -> Filling:
    """Fills rows with documents of all sources by their shares of tokens or samples.

    Raises:
        SourceExhausted: The plan ends before this window.
    """
    tokens = space.just_below(fullness[0] if fullness else space.num_rows * space.seq_len)
    while True:
        division = mixture.divide(ledger, upcoming, tokens, time)
        counts = division.counts
        lengths = np.concatenate([source.take(count).length for source, count in zip(upcoming, counts, strict=True)])
        arrival = _interleave(counts)
        packing = pack(lengths[arrival], space.seq_len)
        if packing.num_bins <= space.num_rows:
            break
        fits = int(lengths.sum()) * space.num_rows // packing.num_bins
        tokens = min(space.just_below(fits), tokens - space.seq_len)
    account = division.account
    mixture.check(account, division.finished)
    bin_of = np.empty(len(lengths), np.int64)
    bin_of[arrival] = packing.bin_of
    bins = np.split(bin_of, np.cumsum(counts)[:-1])
    by_tokens = mixture.unit.value == "tokens"
    account.take([source.tokens(count) if by_tokens else count for source, count in zip(upcoming, counts, strict=True)])
    bins, debts = _top_up(account, mixture.left(ledger), upcoming, bins, _rooms(lengths, bin_of, space), by_tokens)
    after = ledger.after(upcoming, [len(placed) for placed in bins], debts)
    return Filling(bins, after, account.shares, (sum(after.tokens) - sum(ledger.tokens),))


def _interleave(counts: Sequence[int]) -> np.ndarray:
    """int64 [documents]: an order of concatenated documents in which all sources advance evenly."""
    places = [(np.arange(count) + 0.5) / max(count, 1) for count in counts]
    return np.argsort(np.concatenate(places), kind="stable")


def _rooms(lengths: np.ndarray, bin_of: np.ndarray, space: Space) -> Rooms:
    """The room that packed documents leave."""
    load = np.bincount(bin_of, lengths, space.num_rows).astype(np.int64)
    rooms = Rooms(space.seq_len)
    for bin_no in np.flatnonzero(load < space.seq_len)[::-1].tolist():
        rooms.add(bin_no, space.seq_len - int(load[bin_no]))
    return rooms


def _top_up(
    account: Account,
    left: Sequence[int | None],
    upcoming: Sequence[Upcoming],
    bins: list[np.ndarray],
    rooms: Rooms,
    by_tokens: bool,
) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Adds one document at a time, from the source that is owed most, until none that is due fits.

    Room that happens to suit one source alone may pull the shares apart at the end; what came after the last state
    with every source within one document of its share is taken back.

    Returns:
        The bins with those of the added documents, and the debts after all of it.
    """
    counts = [len(placed) for placed in bins]
    added: list[tuple[int, int]] = []
    num_kept, debts = 0, account.debts()
    is_exact = account.is_exact()
    lengths = [source.length(count) for source, count in zip(upcoming, counts, strict=True)]
    placing = True
    while placing:
        placing = False
        for source in account.due(lengths if by_tokens else [1] * len(lengths)):
            if left[source] == counts[source]:
                continue
            bin_no = rooms.take(lengths[source])
            if bin_no >= 0:
                added.append((source, bin_no))
                account.take_one(source, lengths[source] if by_tokens else 1)
                counts[source] += 1
                lengths[source] = upcoming[source].length(counts[source])
                now_exact = account.is_exact()
                if now_exact or not is_exact:
                    is_exact = now_exact
                    num_kept, debts = len(added), account.debts()
                placing = True
                break
    extra: list[list[int]] = [[] for _ in bins]
    for source, bin_no in added[:num_kept]:
        extra[source].append(bin_no)
    return [np.concatenate([old, np.array(new, np.int64)]) for old, new in zip(bins, extra, strict=True)], debts


# ---- rows of one source each -------------------------------------------------------------------------------------


def fill_own_rows(
    ledger: Ledger, fullness: Sequence[int], upcoming: Sequence[Upcoming], mixture: Mixture, time: float, space: Space
) -> Filling:
    """Fills rows with documents of one source each, by shares of rows.

    Raises:
        SourceExhausted: The plan ends before this window.
    """
    left = mixture.left(ledger)
    last: dict[int, np.ndarray] = {}
    while True:
        account = mixture.account(ledger, time, [1] * len(upcoming), tuple(last))
        num_shared = space.num_rows - sum(_num_bins(placed) for placed in last.values())
        mixture.check(account, tuple(last))
        num_rows = [0] * len(upcoming)
        for k, count in zip(account.active, apportion(account.owed(num_shared), num_shared), strict=True):
            num_rows[k] = count
        packed = {}
        for k in account.active:
            full = fullness[k] if fullness else 0
            packed[k] = _own_bins(upcoming[k], left[k], Space(num_rows[k], space.seq_len), full or space.seq_len)
        short = {k: placed for k, placed in packed.items() if _num_bins(placed) < num_rows[k]}
        if not short:
            break
        last |= short
    account.take(num_rows)
    bins, first = [], 0
    for k in range(len(upcoming)):
        placed = last[k] if k in last else packed.get(k, np.zeros(0, np.int64))
        bins.append(placed + first)
        first += _num_bins(placed)
    after = ledger.after(upcoming, [len(placed) for placed in bins], account.debts())
    return Filling(bins, after, account.shares, _fullness(fullness, ledger, after, num_rows, upcoming))


def _num_bins(placed: np.ndarray) -> int:
    return int(placed.max()) + 1 if len(placed) else 0


def _fullness(
    before: Sequence[int], ledger: Ledger, after: Ledger, num_rows: Sequence[int], upcoming: Sequence[Upcoming]
) -> tuple[int, ...]:
    """Tokens in a row of each source; where it had no rows, what is known from before (0: nothing)."""
    known = before or (0,) * len(upcoming)
    taken = [now - then for now, then in zip(after.tokens, ledger.tokens, strict=True)]
    return tuple(tokens // rows if rows else old for tokens, rows, old in zip(taken, num_rows, known, strict=True))


def _own_bins(source: Upcoming, left: int | None, space: Space, row_tokens: int) -> np.ndarray:
    """Packs the next documents of one source into rows of its own until the one that comes next has no place.

    Returns:
        int64: the bin of each document. Bins 0 and on are used; not all of them where the source has too few documents.
    """
    if space.num_rows == 0:
        return np.zeros(0, np.int64)
    # Rows of one source are packed less evenly than mixed ones; a second packing costs more than some topping up.
    tokens = space.just_below(space.num_rows * row_tokens - space.num_rows * space.seq_len // _SLACK)
    while True:
        count = source.count_within(tokens)
        count = count if left is None else min(count, left)
        lengths = source.take(count).length
        packing = pack(lengths, space.seq_len)
        if packing.num_bins <= space.num_rows:
            break
        fits = int(lengths.sum()) * space.num_rows // packing.num_bins
        tokens = min(space.just_below(fits), tokens - space.seq_len)
    rooms = _rooms(lengths, packing.bin_of, space)
    added: list[int] = []
    while left is None or count + len(added) < left:
        bin_no = rooms.take(source.length(count + len(added)))
        if bin_no < 0:
            break
        added.append(bin_no)
    return np.concatenate([packing.bin_of, np.array(added, np.int64)])
