"""What a stage will need, found without compiling it, against the compiled plan."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.plan import PlanEnded
from data_pipeline.plan.supply import check_supply, project
from data_pipeline.spec import Exhausted, RatioUnit, ScheduleUnit, Shape, Task, WeightPoint
from tests.support.histograms import plan_of, short_sources, source


def with_source(sources, name, **fields):
    return [replace(taken, **fields) if taken.name == name else taken for taken in sources]


def row_tokens(plan, num_windows):
    """What rows really hold; by source where each has its own."""
    taken = plan.cursor(num_windows).ledger.tokens
    if plan.mixture.unit is RatioUnit.rows:
        windows = [plan.window(number) for number in range(num_windows)]
        rows = sum(np.bincount(window.source[window.row_start[:-1]], minlength=len(taken)) for window in windows)
        return (np.array(taken) / rows).tolist()
    return [sum(taken) / (num_windows * plan.window_rows)] * len(taken)


CASES = {
    "constant": {},
    "step": {"gen": {"schedule": (WeightPoint(at=100, weight=1),)}},
    "ramps": {
        "gen": {"schedule": (WeightPoint(at=200, weight=0, shape=Shape.linear),)},
        "text": {"schedule": (WeightPoint(at=80, weight=3), WeightPoint(at=240, weight=9, shape=Shape.cosine))},
    },
    "leaving": {"und": {"max_epochs": 2.5, "on_exhausted": Exhausted.reweight}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unit", RatioUnit)
def test_the_projection_comes_near_the_compiled_plan(unit, case):
    sources = short_sources()
    for name, fields in CASES[case].items():
        sources = with_source(sources, name, **fields)
    plan = plan_of(sources, ratio_unit=unit)
    num_windows = 40
    found = project(plan, num_windows * plan.steps_per_window, row_tokens(plan, num_windows))
    ledger = plan.cursor(num_windows).ledger
    assert found.windows == num_windows
    assert found.documents == pytest.approx(ledger.documents, rel=0.03)
    assert found.tokens == pytest.approx(ledger.tokens, rel=0.03)
    # Going on from the middle is no worse.
    later = project(plan, num_windows * plan.steps_per_window, row_tokens(plan, num_windows), start=plan.cursor(20))
    assert later.documents == pytest.approx(ledger.documents, rel=0.03)
    if case == "leaving":
        und = [taken.name for taken in plan.sources].index("und")
        left = next(n for n in range(num_windows) if und in plan.window(n).finished)
        assert abs(found.exhausted_at[und] - left * plan.steps_per_window) <= 2 * plan.steps_per_window
    if case == "step":
        assert found.changes == [(104, 0, 1)], "a point holds from a window's first step on"


def test_points_by_tokens_hold_from_the_window_after():
    sources = with_source(short_sources(), "gen", schedule=(WeightPoint(at=100_000, weight=0),))
    plan = plan_of(sources, schedule_unit=ScheduleUnit.token)
    found = project(plan, 160, row_tokens(plan, 10))
    gen = 0
    without = next(n for n in range(20) if plan.window(n).shares[gen] == 0)
    assert sum(plan.cursor(without - 1).ledger.tokens) < 100_000 <= sum(plan.cursor(without).ledger.tokens)
    assert found.changes == [(without * plan.steps_per_window, gen, 0)]


def test_ends_of_epochs():
    plan = plan_of([source("a", Task.text, 1, [64] * 100)])
    found = project(plan, 40, [256.0])
    # 16 rows of 4 documents a step.
    assert found.epoch_ends[0] == [1, 3, 4, 6, 7, 9, 10, 12, 14, 15, 17, 18, 20, 21, 23, 24]


@pytest.mark.parametrize("unit", RatioUnit)
def test_what_passes_lasts_and_what_is_refused_would_not_have(unit):
    """The bar of a run that is refused lies within its padding of the first one that runs out."""
    num_steps = 80
    epochs = None
    for percent in range(100, 400, 2):
        plan = plan_of(with_source(short_sources(), "und", max_epochs=percent / 100), ratio_unit=unit)
        try:
            check_supply(plan, num_steps)
        except UserError:
            continue
        epochs = percent / 100
        plan.window(num_steps // plan.steps_per_window - 1)
        break
    assert epochs is not None
    too_few = plan_of(with_source(short_sources(), "und", max_epochs=round(epochs * 0.9, 2)), ratio_unit=unit)
    with pytest.raises(UserError, match=r"source 'und': runs out at step \d+, [\d,]+ of [\d,]+ documents"):
        too_few.window(num_steps // plan.steps_per_window - 1)


def test_the_refusal_gives_the_numbers():
    sources = with_source(short_sources(), "und", max_epochs=2)
    with pytest.raises(UserError) as caught:
        check_supply(plan_of(sources), 1000)
    message = str(caught.value)
    assert "\n" not in message
    # 16 rows of 256 tokens, a fifth of them from documents of some 38 tokens.
    mean = sources[0].lengths.mean()
    assert f"{1000 * 16 * 256 / 5 / mean / 1200:.2f} epochs" in message
    assert "source 'und': max_epochs=2 allows 2,400 documents of 1,200" in message
    assert "over 1,000 steps" in message
    lasts = int(message.split("lasts for about ")[1].split(" ")[0])
    assert lasts == pytest.approx(2400 * mean / (16 * 256 / 5), abs=16)


def test_sources_that_may_run_out_are_not_refused():
    for policy in (Exhausted.reweight, Exhausted.stop):
        plan = plan_of(with_source(short_sources(), "und", max_epochs=2, on_exhausted=policy))
        found = check_supply(plan, 1000)
        und = [taken.name for taken in plan.sources].index("und")
        assert found.exhausted_at[und] == pytest.approx(110, abs=10)
        assert (found.ends_at is None) == (policy is Exhausted.reweight)


def test_one_that_takes_over_may_be_too_small():
    sources = with_source(short_sources(), "gen", max_epochs=1, on_exhausted=Exhausted.reweight)
    check_supply(plan_of(with_source(sources, "und", max_epochs=4)), 110)
    with pytest.raises(UserError, match="source 'und'"):
        check_supply(plan_of(with_source(sources, "und", max_epochs=4)), 200)
    alone = with_source(short_sources(), "und", max_epochs=4)
    check_supply(plan_of(alone), 200)


def test_limits_are_never_exceeded_and_a_plan_that_stops_ends():
    sources = with_source(short_sources(), "und", max_epochs=2, on_exhausted=Exhausted.stop)
    plan = plan_of(sources)
    end = plan.ends_at_step(1000)
    assert end is not None
    assert plan.ends_at_step(end) is None
    assert plan.ends_at_step(end + 1) == end
    plan.row(end * 16 - 1)
    with pytest.raises(PlanEnded, match=rf"ends before step {end}: source 'und' has given 2,\d\d\d of 2,400 documents"):
        plan.row(end * 16)
    assert plan.cursor_at(end)["window_no"] == end // plan.steps_per_window
