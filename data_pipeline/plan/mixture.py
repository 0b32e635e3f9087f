"""The ledger of the mixture: how much each source gives to a window, and what it is owed.

A window's shares are what the weights say at its first step. Every window adds share x amount to what a source is owed;
the ledger carries what is owed but not yet taken as a debt, in exact integers, and a window takes from each
source the documents that bring its debt nearest to zero. What one window misses the next makes good, also when
weights have changed in between, so a source stays within one of its documents (or rows) of what it is owed for ever.
Documents leave a source strictly in the order of its stream, hence none is lost or repeated within an epoch.

A source that has fewer documents left under its cap than a window asks for gives those and leaves the mixture; the
others share the rest of that window, and all later ones, in the ratio of their own shares.
A source whose weight is 0 for a while gives nothing; the fraction of a document that it is owed waits until it is back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.documents import Chunk, DocumentStream
from data_pipeline.plan.schedule import WHOLE, WeightCurve, apportion, shares_of
from data_pipeline.spec import RatioUnit, ScheduleUnit

_ROUNDINGS = 4
"""How often counts are rounded to whole documents against the total that the rounding before gave."""
_MENDINGS = 256
"""How many single documents are then added or taken back while a source is more than a document off."""


class SourceExhausted(Exception):
    """A source whose end ends the plan cannot give what a window asks for; never reaches a user."""

    def __init__(self, source_no: int) -> None:
        super().__init__(source_no)
        self.source_no = source_no
        """Number of the source; -1 where every source has given all it may."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the windows before have taken from each source, and what they owe it: the state of the mixture."""

    documents: tuple[int, ...]
    """Documents taken, which is also the position in the source's stream."""
    tokens: tuple[int, ...]
    """Tokens taken."""
    debts: tuple[int, ...]
    """Owed and not yet taken, in 1/WHOLE of the ratio unit; negative where more was taken. What a source was owed in
    all is what was taken plus its debt. They sum to 0."""

    @classmethod
    def empty(cls, num_sources: int) -> "Ledger":
        """The ledger before the first window."""
        nothing = (0,) * num_sources
        return cls(nothing, nothing, nothing)

    def after(self, upcoming: Sequence["Upcoming"], counts: Sequence[int], debts: Sequence[int]) -> "Ledger":
        """The ledger once these numbers of documents are taken."""
        documents = tuple(before + count for before, count in zip(self.documents, counts, strict=True))
        taken = zip(self.tokens, upcoming, counts, strict=True)
        return Ledger(documents, tuple(before + source.tokens(count) for before, source, count in taken), tuple(debts))


class Upcoming:
    """The next documents of one stream, read ahead as far as somebody looks."""

    def __init__(self, stream: DocumentStream, first: int) -> None:
        self._stream = stream
        self.first = first
        """Position of the first of them in the stream."""
        self.longest = stream.longest
        """Tokens of the longest document of the source."""
        self._mean = stream.mean
        self._chunk = stream.read(first, 0)
        self._sums = np.zeros(1, np.int64)

    def _look(self, count: int) -> None:
        """Makes sure that `count` documents are known."""
        known = len(self._chunk.length)
        if count > known:
            more = self._stream.read(self.first + known, max(count, known + known // 8 + 16) - known)
            parts = zip(_arrays(self._chunk), _arrays(more), strict=True)
            self._chunk = Chunk(*(np.concatenate(pair) for pair in parts))
            self._sums = np.concatenate([self._sums, self._sums[-1] + np.cumsum(more.length)])

    def tokens(self, count: int) -> int:
        """Tokens of the next `count` documents."""
        self._look(count)
        return int(self._sums[count])

    def length(self, at: int) -> int:
        """Tokens of the document `at` places ahead."""
        self._look(at + 1)
        return int(self._chunk.length[at])

    def count_for(self, tokens: float) -> int:
        """How many of the next documents come nearest to this many tokens."""
        if tokens <= 0:
            return 0
        self._look(int(tokens / self._mean * 1.02) + 2)
        while self._sums[-1] < tokens:
            self._look(len(self._chunk.length) + 1)
        after = int(np.searchsorted(self._sums, tokens))
        return after if self._sums[after] - tokens <= tokens - self._sums[after - 1] else after - 1

    def count_within(self, tokens: int) -> int:
        """How many of the next documents hold at most this many tokens."""
        self._look(int(tokens / self._mean * 1.02) + 2)
        while self._sums[-1] <= tokens:
            self._look(len(self._chunk.length) + 1)
        return int(np.searchsorted(self._sums, tokens, side="right")) - 1

    def take(self, count: int) -> Chunk:
        """The next `count` documents."""
        self._look(count)
        return Chunk(*(array[:count] for array in _arrays(self._chunk)))


def _arrays(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return chunk.document, chunk.epoch, chunk.length


class Account:
    """What the sources that share a window are owed in it; kept up to date while documents are taken.

    Sources that are out of the mixture keep their debts, so the debts of those in it need not sum to 0 and cannot all
    become 0: each is left with a part of that sum in proportion to its largest document.
    """

    def __init__(self, debts: Sequence[int], shares: Sequence[int], sizes: Sequence[int]) -> None:
        """Debts as in the ledger, shares that sum to WHOLE, and the largest document of each source in the unit."""
        self.shares = tuple(shares)
        self.active = [k for k, share in enumerate(shares) if share]
        self._debts = list(debts)
        self._bounds = [WHOLE * size for size in sizes]
        stuck, room = sum(debts[k] for k in self.active), sum(sizes[k] for k in self.active)
        self._goals = [stuck * sizes[k] // room if shares[k] else 0 for k in range(len(sizes))]

    def owed(self, amount: int) -> list[int]:
        """What each active source should give so that `amount` is shared, in 1/WHOLE; in the order of `active`."""
        return [self._debts[k] - self._goals[k] + self.shares[k] * amount for k in self.active]

    def take(self, amounts: Sequence[int]) -> None:
        """Enters what active sources gave; amounts of the others are not looked at."""
        total = sum(amounts[k] for k in self.active)
        for k in self.active:
            self._debts[k] += self.shares[k] * total - WHOLE * amounts[k]

    def take_one(self, source: int, size: int) -> None:
        """Enters one document of an active source; a negative size takes it back."""
        for k in self.active:
            self._debts[k] += self.shares[k] * size
        self._debts[source] -= WHOLE * size

    def due(self, sizes: Sequence[int]) -> list[int]:
        """Sources that may give their next document (of these sizes), the one that is owed most first.

        A source may as long as it ends up at most that one document above its share.
        """
        debts = {k: self._debts[k] - self._goals[k] for k in self.active}
        allowed = [k for k in self.active if debts[k] + self.shares[k] * sizes[k] >= 0]
        return sorted(allowed, key=lambda k: (-debts[k], k))

    def farthest(self) -> tuple[int, bool] | None:
        """The source that is the most documents off what it is owed, and whether it is owed more; None if all are
        within one."""
        off = [k for k in self.active if abs(self._debts[k]) > self._bounds[k]]
        if not off:
            return None
        worst = max(off, key=lambda k: (abs(self._debts[k]) / self._bounds[k], -k))
        return worst, self._debts[worst] > 0

    def copy(self) -> "Account":
        """One that can be tried things on."""
        other = Account.__new__(Account)
        other.shares, other.active, other._bounds, other._goals = self.shares, self.active, self._bounds, self._goals
        other._debts = list(self._debts)
        return other

    def is_exact(self) -> bool:
        """Whether every active source is within one document of what it is owed."""
        return all(abs(self._debts[k]) <= self._bounds[k] for k in self.active)

    def debts(self) -> tuple[int, ...]:
        """The debts of all sources as they stand."""
        return tuple(self._debts)


@dataclass(frozen=True, slots=True)
class Division:
    """Documents of each source for one window."""

    counts: list[int]
    account: Account
    """Of the sources that share the window, before it."""
    finished: tuple[int, ...]
    """Sources that give all they have left although they are due more."""


class Mixture:
    """Divides windows between sources by their shares."""

    def __init__(
        self,
        curves: Sequence[WeightCurve],
        unit: RatioUnit,
        *,
        schedule_unit: ScheduleUnit = ScheduleUnit.step,
        factors: Sequence[float] = (),
        limits: Sequence[int | None] = (),
        leaves: Sequence[bool] = (),
    ) -> None:
        """Weights over time; what temperature multiplies them with; how many documents sources may give in all, and
        whether the mixture goes on without them then."""
        self.curves = tuple(curves)
        self.unit = unit
        self.schedule_unit = schedule_unit
        self.factors = tuple(factors) or (1.0,) * len(self.curves)
        self.limits = tuple(limits) or (None,) * len(self.curves)
        self.leaves = tuple(leaves) or (True,) * len(self.curves)

    def weights(self, time: float) -> list[float]:
        """Weights of all sources once `time` steps or tokens (as schedule_unit says) are trained."""
        return [curve.at(time) * factor for curve, factor in zip(self.curves, self.factors, strict=True)]

    def shares(self, time: float, is_in: Sequence[bool] = ()) -> tuple[int, ...]:
        """Shares in 1/WHOLE at a time, divided among the sources that are in (all, unless said); 0 for the others."""
        weights = self.weights(time)
        if is_in:
            weights = [weight if there else 0.0 for weight, there in zip(weights, is_in, strict=True)]
        return shares_of(weights)

    def time_of(self, step: int, ledger: Ledger) -> float:
        """The argument of weights for a window that begins with a step."""
        return step if self.schedule_unit is ScheduleUnit.step else sum(ledger.tokens)

    def left(self, ledger: Ledger) -> list[int | None]:
        """Documents that each source may still give; None: any number."""
        return [
            None if limit is None else limit - taken for limit, taken in zip(self.limits, ledger.documents, strict=True)
        ]

    def account(self, ledger: Ledger, time: float, sizes: Sequence[int], finished: Sequence[int] = ()) -> Account:
        """The account of a window among the sources that are still in the mixture and do not finish in it.

        Raises:
            SourceExhausted: No source with weight is left.
        """
        left = self.left(ledger)
        is_in = [k not in finished and not (left[k] == 0 and leaves) for k, leaves in enumerate(self.leaves)]
        shares = self.shares(time, is_in)
        if not any(shares) and not finished:
            raise SourceExhausted(-1)
        return Account(ledger.debts, shares, sizes)

    def check(self, account: Account, finished: Sequence[int]) -> None:
        """Looks whether a window can be, given the sources that have given all they may.

        Raises:
            SourceExhausted: One of them ends the plan, or they were all there were.
        """
        ending = [k for k in finished if not self.leaves[k]]
        if ending or not account.active:
            raise SourceExhausted(ending[0] if ending else -1)

    def divide(self, ledger: Ledger, upcoming: Sequence[Upcoming], tokens: int, time: float) -> Division:
        """Documents per source for a window of about `tokens` tokens that leave every source at its share.

        For shares of tokens or samples; see `Account` and `schedule.apportion` for rows.

        Raises:
            SourceExhausted: As `account`.
        """
        left = self.left(ledger)
        sizes = [source.longest for source in upcoming] if self.unit is RatioUnit.tokens else [1] * len(upcoming)
        finished: list[int] = []
        while True:
            account = self.account(ledger, time, sizes, finished)
            last = {k: count for k in finished if (count := left[k]) is not None}
            rest = tokens - sum(upcoming[k].tokens(count) for k, count in last.items())
            split = _split_tokens if self.unit is RatioUnit.tokens else _split_samples
            counts = [last.get(k, 0) for k in range(len(upcoming))]
            for k, count in zip(account.active, split(account, upcoming, rest), strict=True):
                counts[k] = count
            short = [k for k in account.active if (available := left[k]) is not None and counts[k] > available]
            if not short:
                return Division(counts, account, tuple(sorted(finished)))
            finished += short


def _split_tokens(account: Account, upcoming: Sequence[Upcoming], tokens: int) -> list[int]:
    """Documents of each active source, the number nearest to what it is owed."""
    counts: list[int] = []
    for _ in range(_ROUNDINGS):
        owed = zip(account.active, account.owed(tokens), strict=True)
        counts = [upcoming[k].count_for(amount / WHOLE) for k, amount in owed]
        # Shares are of what is really taken: a source of long documents that takes half a document too much
        # moves the mark of all others.
        taken = sum(upcoming[k].tokens(count) for k, count in zip(account.active, counts, strict=True))
        if taken == tokens:
            break
        tokens = taken
    return _mended(account, upcoming, counts)


def _mended(account: Account, upcoming: Sequence[Upcoming], counts: list[int]) -> list[int]:
    """Adds or takes back single documents while a source is more than one off: rounding may go round in circles, and
    what sources of long documents are off then moves those of short ones by several."""
    trial = account.copy()
    of_source = dict(zip(account.active, counts, strict=True))
    trial.take([upcoming[k].tokens(of_source.get(k, 0)) for k in range(len(upcoming))])
    for _ in range(_MENDINGS):
        found = trial.farthest()
        if found is None or (not found[1] and not of_source[found[0]]):
            break
        source, is_owed = found
        of_source[source] -= 0 if is_owed else 1
        size = upcoming[source].length(of_source[source])
        trial.take_one(source, size if is_owed else -size)
        of_source[source] += 1 if is_owed else 0
    return list(of_source.values())


def _split_samples(account: Account, upcoming: Sequence[Upcoming], tokens: int) -> list[int]:
    """The largest number of documents, divided by share, that holds at most `tokens` tokens; found by bisection."""

    def size(total: int) -> int:
        counts = apportion(account.owed(total), total)
        return sum(upcoming[k].tokens(count) for k, count in zip(account.active, counts, strict=True))

    if not account.active:
        return []
    low, high = 0, 64
    while size(high) <= tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= tokens else (low, middle)
    return apportion(account.owed(low), low)
