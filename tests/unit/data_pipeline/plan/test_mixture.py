"""The ledger: nearest counts, shares that never drift."""

import numpy as np
import pytest

from data_pipeline.plan.documents import DocumentStream, documents_of
from data_pipeline.plan.mixture import Account, Ledger, Mixture, SourceExhausted, Upcoming
from data_pipeline.plan.schedule import WHOLE, WeightCurve, shares_of
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


@pytest.mark.parametrize("tokens", [0, 1, 40, 997, 10_000])
def test_count_within_is_the_largest_that_fits(tokens):
    upcoming = Upcoming(stream(), 37)
    count = upcoming.count_within(tokens)
    assert upcoming.tokens(count) <= tokens < upcoming.tokens(count + 1)


def ahead(streams, ledger):
    return [Upcoming(taken, first) for taken, first in zip(streams, ledger.documents, strict=True)]


def window(mixture, ledger, streams, tokens, time=0):
    """What `fill` does with a division, without packing."""
    upcoming = ahead(streams, ledger)
    division = mixture.divide(ledger, upcoming, tokens, time)
    mixture.check(division.account, division.finished)
    by_tokens = mixture.unit is RatioUnit.tokens
    amounts = [u.tokens(c) if by_tokens else c for u, c in zip(upcoming, division.counts, strict=True)]
    division.account.take(amounts)
    return division, ledger.after(upcoming, division.counts, division.account.debts())


def curves(*weights):
    return [WeightCurve(weight) for weight in weights]


def three_streams():
    return [stream("a"), stream("b", np.full(300, 40)), stream("c", np.random.default_rng(1).integers(100, 200, 50))]


@pytest.mark.parametrize("unit", [RatioUnit.tokens, RatioUnit.samples])
def test_a_division_leaves_every_source_within_a_document_of_what_it_is_owed(unit):
    mixture, streams = Mixture(curves(5, 3, 2), unit), three_streams()
    ledger = Ledger.empty(3)
    bounds = [WHOLE * (size if unit is RatioUnit.tokens else 1) for size in (90, 40, 200)]
    for _ in range(50):
        before = ledger
        _, ledger = window(mixture, ledger, streams, 20_000)
        assert sum(ledger.tokens) - sum(before.tokens) == pytest.approx(20_000, abs=400)
        assert all(abs(debt) <= bound for debt, bound in zip(ledger.debts, bounds, strict=True))
        assert sum(ledger.debts) == 0
        amounts = ledger.tokens if unit is RatioUnit.tokens else ledger.documents
        owed = [sum(amounts) * share for share in shares_of([5, 3, 2])]
        assert [WHOLE * amount + debt for amount, debt in zip(amounts, ledger.debts, strict=True)] == owed


def test_a_source_without_weight_gives_nothing_and_keeps_its_debt():
    mixture, streams = Mixture(curves(1, 1, 0), RatioUnit.tokens), three_streams()
    debts = (3 * WHOLE, -43 * WHOLE, 40 * WHOLE)
    division, ledger = window(mixture, Ledger((9, 9, 9), (400, 400, 400), debts), streams, 5_000)
    assert division.counts[2] == 0
    assert ledger.debts[2] == debts[2]
    assert sum(ledger.debts) == 0
    assert abs(ledger.debts[0]) <= 90 * WHOLE
    assert abs(ledger.debts[1]) <= 40 * WHOLE


@pytest.mark.parametrize("unit", [RatioUnit.tokens, RatioUnit.samples])
def test_who_has_too_little_left_gives_that_and_the_others_share_the_rest(unit):
    streams = three_streams()
    mixture = Mixture(curves(5, 3, 2), unit, limits=[None, 60, None])
    division, ledger = window(mixture, Ledger.empty(3), streams, 20_000)
    assert division.finished == (1,)
    assert division.counts[1] == 60
    assert ledger.debts[1] == 0
    assert division.account.shares == shares_of([5, 0, 2])
    assert sum(ledger.tokens) == pytest.approx(20_000, abs=200)
    again, _ = window(mixture, ledger, streams, 20_000)
    assert again.counts[1] == 0
    assert again.account.shares == shares_of([5, 0, 2])
    assert again.finished == ()


def test_who_must_not_be_missing_ends_the_plan():
    mixture = Mixture(curves(5, 3, 2), RatioUnit.tokens, limits=[None, 60, None], leaves=[True, False, True])
    with pytest.raises(SourceExhausted) as caught:
        window(mixture, Ledger.empty(3), three_streams(), 20_000)
    assert caught.value.source_no == 1
    assert window(mixture, Ledger.empty(3), three_streams(), 5_000)[0].finished == ()


def test_nobody_left_ends_the_plan():
    mixture = Mixture(curves(5, 3), RatioUnit.samples, limits=[7, 8])
    with pytest.raises(SourceExhausted) as caught:
        window(mixture, Ledger.empty(2), three_streams()[:2], 20_000)
    assert caught.value.source_no == -1


def test_due_names_whoever_is_owed_most_first():
    account = Account([100 * WHOLE, -100 * WHOLE, 0], shares_of([1, 1, 2]), [10, 10, 10])
    assert account.due([10, 10, 10]) == [0, 2]
    assert not account.is_exact()
    assert Account([100 * WHOLE, -100 * WHOLE, 0], shares_of([1, 1, 2]), [100, 100, 10]).is_exact()
    account.take_one(0, 80)
    assert account.debts() == (40 * WHOLE, -80 * WHOLE, 40 * WHOLE)
