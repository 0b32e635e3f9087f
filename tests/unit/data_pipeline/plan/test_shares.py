"""Shares over hundreds of windows: exact against a count of one's own, whatever weights, units and caps do."""

import json
import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.plan import PlanEnded, compile_plan
from data_pipeline.plan.schedule import WHOLE
from data_pipeline.spec import DataSpec, Exhausted, RatioUnit, ScheduleUnit, Shape, Task, WeightPoint
from tests.support.histograms import plan_of, short_sources, source


def points(*described):
    return tuple(WeightPoint(at=at, weight=weight, shape=shape) for at, weight, shape in described)


def sources_with(**fields_of):
    """Four sources of unlike lengths: und, gen, text and a few long ones."""
    long = source("long", Task.text, 1, np.random.default_rng(5).integers(120, 257, 150), can_cut=True)
    return [replace(taken, **fields_of.get(taken.name, {})) for taken in [*short_sources(), long]]


WAVES = {
    "und": {"schedule": points((40, 0, Shape.linear), (90, 0, Shape.step), (100, 6, Shape.cosine))},
    "gen": {"schedule": points(*((at, at % 48 and 4, Shape.step) for at in range(24, 900, 24)))},
    "long": {"weight": 0, "schedule": points(*((at, at % 64 and 3, Shape.step) for at in range(32, 900, 32)))},
}
CAPS = {
    "und": {"max_epochs": 3.3, "on_exhausted": Exhausted.reweight},
    "long": {"max_epochs": 1, "on_exhausted": Exhausted.reweight},
}
MIXTURES = {
    "constant": ({}, {}),
    "coming and going": (WAVES, {}),
    "temperature": (WAVES, {"temperature": 3.0}),
    "leaving": (CAPS, {}),
    "leaving while weights change": ({name: {**WAVES.get(name, {}), **CAPS.get(name, {})} for name in WAVES}, {}),
    "one source alone at times": (
        {
            "text": {"schedule": points((16, 0, Shape.step), (64, 3, Shape.step))},
            "gen": {"schedule": points((16, 0, Shape.step), (64, 5, Shape.step))},
            "long": {"schedule": points((16, 0, Shape.step), (64, 1, Shape.step))},
        },
        {},
    ),
}


def weights_now(plan, step, sizes):
    return [Fraction(taken.curve.at(step)) * Fraction(size) for taken, size in zip(plan.sources, sizes, strict=True)]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("unit", RatioUnit)
def test_every_source_has_what_it_is_owed_within_one_document_for_ever(unit, mixture):
    fields, settings = MIXTURES[mixture]
    plan = plan_of(sources_with(**fields), global_batch_size=8, window_rows=32, ratio_unit=unit, **settings)
    count = len(plan.sources)
    sizes = [1.0] * count
    if "temperature" in settings:
        in_unit = [s.size if unit is RatioUnit.samples else s.size * s.mean for s in plan.streams]
        sizes = [size ** (1 / settings["temperature"]) for size in in_unit]
    bounds = [stream.longest if unit is RatioUnit.tokens else 1 for stream in plan.streams]
    owed, taken = [Fraction(0)] * count, np.zeros(count, np.int64)
    out: set[int] = set()
    for window_no in range(220):
        window = plan.window(window_no)
        amounts = {
            RatioUnit.tokens: lambda w=window: np.bincount(w.source, w.length, count),
            RatioUnit.samples: lambda w=window: np.bincount(w.source, minlength=count),
            RatioUnit.rows: lambda w=window: np.bincount(w.source[w.row_start[:-1]], minlength=count),
        }[unit]().astype(np.int64)
        weights = weights_now(plan, window_no * plan.steps_per_window, sizes)
        # Who gives the rest that it has does so in place of a share.
        rest = {k for k in window.finished if window.shares[k] == 0}
        weights = [0 if k in out | rest else weight for k, weight in enumerate(weights)]
        shared = sum(int(amounts[k]) for k in range(count) if k not in rest)
        for k in range(count):
            owed[k] += amounts[k] if k in rest else shared * weights[k] / sum(weights)
            assert weights[k] or k in rest or amounts[k] == 0, "who has no weight gives nothing"
        out |= set(window.finished)
        taken += amounts
        # A trillionth of what was planned so far is how far whole-numbered shares may be off.
        slack = float(taken.sum()) / WHOLE + 1e-3
        for k in range(count):
            assert abs(float(taken[k] - owed[k])) <= bounds[k] + slack, (window_no, plan.sources[k].name)
        assert sum(plan.cursor(window_no + 1).ledger.debts) == 0
    if "leaving" in mixture:
        assert len(out) == 2, "the test must see sources leave"
    assert len(json.dumps(plan.cursor_at(220 * plan.steps_per_window))) < 450


@pytest.mark.parametrize("unit", RatioUnit)
def test_who_leaves_has_given_every_document_of_its_epochs_and_the_others_keep_their_ratio(unit):
    plan = plan_of(sources_with(**CAPS), global_batch_size=8, window_rows=32, ratio_unit=unit)
    number = {taken.name: k for k, taken in enumerate(plan.sources)}
    plan.window(299)
    documents = plan.cursor(300).ledger.documents
    assert documents[number["und"]] == 3960 == plan.mixture.limits[number["und"]]
    assert documents[number["long"]] == plan.streams[number["long"]].size
    shares = dict(zip(number, plan.window(299).shares, strict=True))
    assert shares == {"gen": WHOLE * 5 // 8, "long": 0, "text": WHOLE * 3 // 8, "und": 0}


@pytest.mark.parametrize("unit", RatioUnit)
def test_a_plan_that_stops_gives_no_more_than_the_epochs_and_ends_before_the_first_window_without(unit):
    fields = {"und": {"max_epochs": 2, "on_exhausted": Exhausted.stop}}
    plan = plan_of(sources_with(**fields), global_batch_size=8, window_rows=32, ratio_unit=unit)
    und = [taken.name for taken in plan.sources].index("und")
    step = plan.ends_at_step(10_000)
    assert step is not None
    documents = plan.cursor(step // plan.steps_per_window).ledger.documents[und]
    in_a_window = documents / (step / plan.steps_per_window)
    assert 2400 - 1.5 * in_a_window < documents <= 2400
    with pytest.raises(PlanEnded) as ended:
        plan.window(step // plan.steps_per_window)
    assert ended.value.step == step
    # Another process that begins at the last saved position ends at the same step.
    resumed = plan_of(sources_with(**fields), global_batch_size=8, window_rows=32, ratio_unit=unit)
    resumed.restore(json.loads(json.dumps(plan.cursor_at(step - 1))))
    assert resumed.ends_at_step(10_000) == step
    assert pickle.loads(pickle.dumps(plan)).ends_at_step(10_000) == step


@pytest.mark.parametrize("unit", RatioUnit)
@pytest.mark.parametrize("schedule_unit", ScheduleUnit)
def test_rows_are_the_same_in_whatever_order_they_are_asked_for(unit, schedule_unit):
    fields = {**CAPS, "gen": {"schedule": points((150_000, 1, Shape.cosine))}}
    settings = {
        "global_batch_size": 8,
        "window_rows": 32,
        "ratio_unit": unit,
        "schedule_unit": schedule_unit,
        "temperature": 2.0,
    }
    forward, jumping = (plan_of(sources_with(**fields), **settings) for _ in range(2))
    asked = [2000, 17, 1300, 2001, 31, 32, 0, 1999, 640]
    expected = {row_no: forward.row(row_no) for row_no in sorted(asked)}
    assert {row_no: jumping.row(row_no) for row_no in asked} == expected
    resumed = plan_of(sources_with(**fields), **settings)
    resumed.restore(json.loads(json.dumps(forward.cursor_at(160))))
    assert resumed.row(1300) == expected[1300]
    assert resumed.row(2000) == expected[2000]
    assert forward.digest == jumping.digest


def test_rows_of_one_source_each():
    plan = plan_of(sources_with(), ratio_unit=RatioUnit.rows)
    for row_no in range(256):
        row = plan.row(row_no)
        assert row, "no row is empty"
        assert len({planned.source_no for planned in row}) == 1
    counts = np.zeros(4)
    for step in range(16):
        for row_no in range(16 * step, 16 * step + 16):
            counts[plan.row(row_no)[0].source_no] += 1
    # gen 5, long 1, text 3, und 2 of 11
    assert counts / counts.sum() == pytest.approx(np.array([5, 1, 3, 2]) / 11, abs=1 / 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": points((0, 1, Shape.step))}, r"source 'a': the points of its schedule are at 0; give moments"),
        ({"schedule": points((5, 1, Shape.step), (5, 2, Shape.step))}, r"are at 5, 5; give moments above 0"),
        ({"schedule": points((5, -1, Shape.step))}, r"source 'a': weight -1 is no share"),
        ({"schedule": points((5, 0, Shape.step))}, r"from step 5 on no source has a weight above 0"),
        ({"max_epochs": -1.0}, r"max_epochs=-1.0 must be 0"),
        ({"max_epochs": 0.01}, r"max_epochs=0.01 of 50 documents is less than one document"),
        (
            {"left_out": np.ones(50, bool), "masks": {"small": "x", "dup": "y"}},
            r"source 'a': small, dup leaves out all of its 50 samples but it is to fill 100.0% of the tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        compile_plan(
            DataSpec(seq_len=256), [replace(source("a", Task.text, 1, [5] * 50), **fields)], global_batch_size=8
        )
    assert "\n" not in str(caught.value)


def test_a_negative_temperature_is_refused():
    with pytest.raises(UserError, match=r"data\.temperature=-1\.0 must be 0"):
        plan_of(short_sources(), temperature=-1.0)
