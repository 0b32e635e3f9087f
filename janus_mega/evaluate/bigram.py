"""The baseline for text: a smoothed bigram over the very tokens that the model predicts.

Interpolated Kneser-Ney with the three discounts of Chen and Goodman (1999): a token seen r times after its predecessor
gives up D_r of its count, and what is given up is spread by how many different predecessors a token follows, which in
turn is interpolated with the uniform distribution. The discounts can be taken from counts of counts, but are tuned
here on a slice of the training documents, because a baseline must not be weak by neglect: the fit that reads the slice
best is then made again on all training documents. Held-out text is never looked at.

Documents are int arrays [n] that start with bos; every token but the first is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TUNING_EVERY = 10
"""Every tenth training document tunes the discounts."""
_SCALES = (0.6, 0.8, 1.0, 1.1, 1.2)
"""Factors tried on the discounts that counts of counts suggest."""


@dataclass(frozen=True, slots=True)
class Discounts:
    """What a bigram seen once, twice, or more often gives up."""

    once: float
    twice: float
    more: float

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Discount of each count; 0 for count 0."""
        return np.array([0.0, self.once, self.twice, self.more])[np.minimum(counts, 3)]

    def scaled(self, factor: float) -> "Discounts":
        """All three times a factor, each below what it is taken from."""
        return Discounts(min(self.once * factor, 0.99), min(self.twice * factor, 1.99), min(self.more * factor, 2.99))


class BigramModel:
    """Probabilities of a token given the one before it."""

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, discounts: Discounts | None = None) -> None:
        """Counts the documents; discounts default to those that counts of counts suggest."""
        self.vocab_size = vocab_size
        keys = np.concatenate([_pair_keys(document, vocab_size) for document in documents])
        self._keys, counts = np.unique(keys, return_counts=True)
        left, right = np.divmod(self._keys, vocab_size)
        self.discounts = discounts or _discounts_of(counts)
        given_up = self.discounts.of(counts)
        total = np.bincount(left, counts, vocab_size)
        self._kept = (counts - given_up) / total[left]
        spread = np.bincount(left, given_up, vocab_size)
        self._backoff = np.divide(spread, total, out=np.ones(vocab_size), where=total > 0)
        self._continuation = _continuation(np.bincount(right, minlength=vocab_size), vocab_size)

    def nats(self, document: np.ndarray) -> float:
        """Sum of -ln p over the predicted tokens of a document."""
        keys = _pair_keys(document, self.vocab_size)
        left, right = np.divmod(keys, self.vocab_size)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        kept = np.where(self._keys[place] == keys, self._kept[place], 0.0)
        return float(-np.log(kept + self._backoff[left] * self._continuation[right]).sum())


def fit_bigram(documents: Sequence[np.ndarray], vocab_size: int) -> BigramModel:
    """A bigram with discounts tuned on every tenth training document and counts of all of them."""
    tuning = documents[::TUNING_EVERY]
    rest = [document for number, document in enumerate(documents) if number % TUNING_EVERY]
    if not rest:
        return BigramModel(documents, vocab_size)
    suggested = BigramModel(rest, vocab_size).discounts
    tried = {scale: BigramModel(rest, vocab_size, suggested.scaled(scale)) for scale in _SCALES}
    best = min(_SCALES, key=lambda scale: sum(tried[scale].nats(document) for document in tuning))
    return BigramModel(documents, vocab_size, suggested.scaled(best))


def _pair_keys(document: np.ndarray, vocab_size: int) -> np.ndarray:
    """One integer per pair of neighbours."""
    ids = document.astype(np.int64)
    return ids[:-1] * vocab_size + ids[1:]


def _discounts_of(counts: np.ndarray) -> Discounts:
    """Chen and Goodman's estimates from the numbers of things seen one to four times."""
    seen = [int((counts == times).sum()) for times in range(1, 5)]
    if 0 in seen:  # too little text for the estimates: absolute discounting
        return Discounts(0.75, 0.75, 0.75)
    share = seen[0] / (seen[0] + 2 * seen[1])
    once, twice, more = (r - (r + 1) * share * seen[r] / seen[r - 1] for r in (1, 2, 3))
    return Discounts(max(once, 0.05), max(twice, 0.05), max(more, 0.05))


def _continuation(predecessors: np.ndarray, vocab_size: int) -> np.ndarray:
    """Probability of a token by its number of different predecessors, discounted towards uniform."""
    given_up = _discounts_of(predecessors).of(predecessors)
    total = predecessors.sum()
    return (predecessors - given_up) / total + given_up.sum() / total / vocab_size
