"""The ledger of the mixture: how many documents each source gives to a window.

Every source owns a share of all tokens (or samples) planned so far. A window takes from each source the documents that
bring its total nearest to its share, so what one window misses the next makes good and nothing drifts: the error
of a source stays within one of its documents for ever. Documents leave a source strictly in the order of its stream,
hence none is lost or repeated within an epoch and the whole state is one count per source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.documents import Chunk, DocumentStream
from data_pipeline.spec import RatioUnit

_ROUNDINGS = 4
"""How often counts are rounded to whole documents against the total that the rounding before gave."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the windows before have taken from each source: the state of the mixture."""

    documents: tuple[int, ...]
    """Documents taken, which is also the position in the source's stream."""
    tokens: tuple[int, ...]
    """Tokens taken."""

    def plus(self, source: int, tokens: int) -> "Ledger":
        """The ledger after one more document of a source."""
        documents, all_tokens = list(self.documents), list(self.tokens)
        documents[source] += 1
        all_tokens[source] += tokens
        return Ledger(tuple(documents), tuple(all_tokens))

    def amounts(self, unit: RatioUnit) -> tuple[int, ...]:
        """What the shares count."""
        return self.tokens if unit is RatioUnit.tokens else self.documents


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

    def take(self, count: int) -> Chunk:
        """The next `count` documents."""
        self._look(count)
        return Chunk(*(array[:count] for array in _arrays(self._chunk)))


def _arrays(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return chunk.document, chunk.epoch, chunk.length


class Mixture:
    """Splits windows between sources by their shares."""

    def __init__(self, weights: Sequence[float], unit: RatioUnit) -> None:
        """Weights are relative and positive."""
        total = sum(weights)
        self.shares = tuple(weight / total for weight in weights)
        self.unit = unit

    def counts(self, ledger: Ledger, upcoming: Sequence[Upcoming], tokens: int) -> list[int]:
        """Documents per source for a window of about `tokens` tokens that leave every source at its share."""
        if self.unit is RatioUnit.samples:
            return self._counts_by_samples(ledger, upcoming, tokens)
        before = sum(ledger.tokens)
        counts: list[int] = []
        for _ in range(_ROUNDINGS):
            counts = [
                source.count_for(share * (before + tokens) - taken)
                for source, share, taken in zip(upcoming, self.shares, ledger.tokens, strict=True)
            ]
            # Shares are of what is really taken: a source of long documents that takes half a document too much
            # moves the mark of all others.
            taken_now = sum(source.tokens(count) for source, count in zip(upcoming, counts, strict=True))
            if taken_now == tokens:
                break
            tokens = taken_now
        return counts

    def _counts_by_samples(self, ledger: Ledger, upcoming: Sequence[Upcoming], tokens: int) -> list[int]:
        """The largest number of documents, split by share, that holds at most `tokens` tokens; found by bisection."""
        before = sum(ledger.documents)

        def split(added: int) -> list[int]:
            return [
                max(0, round(share * (before + added)) - taken)
                for share, taken in zip(self.shares, ledger.documents, strict=True)
            ]

        def size(added: int) -> int:
            return sum(source.tokens(count) for source, count in zip(upcoming, split(added), strict=True))

        low, high = 0, 64
        while size(high) <= tokens:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) <= tokens else (low, middle)
        return split(low)

    def deficits(self, ledger: Ledger) -> list[float]:
        """How far each source is below its share, in what the shares count; negative if it is above."""
        amounts = ledger.amounts(self.unit)
        total = sum(amounts)
        return [share * total - amount for share, amount in zip(self.shares, amounts, strict=True)]

    def due(self, ledger: Ledger, lengths: Sequence[int]) -> list[int]:
        """Sources that may give their next document (of these lengths), the one furthest below its share first.

        A source may as long as it ends up at most that one document above its share.
        """
        deficits = self.deficits(ledger)
        sizes = self._sizes(lengths)
        allowed = [k for k, deficit in enumerate(deficits) if deficit + self.shares[k] * sizes[k] >= 0.0]
        return sorted(allowed, key=lambda k: (-deficits[k], k))

    def is_exact(self, ledger: Ledger, longest: Sequence[int]) -> bool:
        """Whether every source is within one document (of these lengths) of its share."""
        sizes = self._sizes(longest)
        return all(abs(deficit) <= size for deficit, size in zip(self.deficits(ledger), sizes, strict=True))

    def _sizes(self, lengths: Sequence[int]) -> Sequence[int]:
        """Documents of these lengths in what the shares count."""
        return lengths if self.unit is RatioUnit.tokens else [1] * len(lengths)
