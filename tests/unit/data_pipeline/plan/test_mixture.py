"""The ledger: nearest counts, shares that never drift."""

import numpy as np
import pytest

from data_pipeline.plan.documents import DocumentStream, documents_of
from data_pipeline.plan.mixture import Ledger, Mixture, Upcoming
from data_pipeline.spec import RatioUnit, Task
from tests.support.histograms import source


def stream(name="text", lengths=None):
    lengths = np.random.default_rng(0).integers(5, 90, 500) if lengths is None else lengths
    return DocumentStream(name, documents_of(source(name, Task.text, 1, lengths), 256), seed=0)


def test_count_for_is_the_nearest():
    upcoming = Upcoming(stream(), 37)
    sums = np.cumsum([0, *(upcoming.length(at) for at in range(400))])
    for tokens in (-5, 0, 1, 40, 997, 10_000):
        best = upcoming.count_for(tokens)
        assert abs(sums[best] - tokens) == np.abs(sums - tokens).min() or tokens < 0
    assert upcoming.count_for(-5) == 0


def test_looking_ahead_in_pieces_sees_what_reading_at_once_sees():
    pieces, whole = Upcoming(stream(), 490), Upcoming(stream(), 490)
    for at in range(60):
        pieces.length(at)
    assert pieces.take(60).document.tolist() == whole.take(60).document.tolist()
    assert pieces.tokens(60) == whole.tokens(60) == int(whole.take(60).length.sum())


@pytest.mark.parametrize("unit", RatioUnit)
def test_shares_hold_within_a_document_after_every_window(unit):
    streams = [stream("a"), stream("b", np.full(300, 40)), stream("c", np.random.default_rng(1).integers(100, 200, 50))]
    mixture = Mixture([5, 3, 2], unit)
    ledger = Ledger((0, 0, 0), (0, 0, 0))
    for _ in range(50):
        upcoming = [Upcoming(taken, first) for taken, first in zip(streams, ledger.documents, strict=True)]
        counts = mixture.counts(ledger, upcoming, 20_000)
        before = sum(ledger.tokens)
        for number, (count, ahead) in enumerate(zip(counts, upcoming, strict=True)):
            for at in range(count):
                ledger = ledger.plus(number, ahead.length(at))
        assert sum(ledger.tokens) - before == pytest.approx(20_000, abs=400)
        sizes = [90, 40, 200] if unit is RatioUnit.tokens else [1, 1, 1]
        assert all(abs(deficit) <= size for deficit, size in zip(mixture.deficits(ledger), sizes, strict=True))


def test_due_names_whoever_is_behind_first():
    mixture = Mixture([1, 1, 2], RatioUnit.tokens)
    ledger = Ledger((1, 1, 1), (100, 300, 400))
    assert mixture.due(ledger, [10, 10, 10])[0] == 0
    assert 1 not in mixture.due(ledger, [10, 10, 10])
    assert not mixture.is_exact(ledger, [10, 10, 10])
    assert mixture.is_exact(ledger, [100, 100, 10])
