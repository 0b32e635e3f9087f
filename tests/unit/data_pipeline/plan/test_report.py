"""What a plan says of itself before anything runs."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.report import report_plan
from data_pipeline.spec import Exhausted, RatioUnit, ScheduleUnit, WeightPoint
from tests.support.histograms import plan_of, short_sources


def test_the_report_adds_up():
    plan = plan_of(short_sources())
    report = report_plan(plan, 30, dp_size=2, micro_batch_size=2)
    rows = [plan.row(row_no) for row_no in range(480)]
    tokens = sum(p.stop - p.start for row in rows for p in row)
    assert report.tokens == tokens == sum(source.tokens for source in report.sources)
    assert report.padding_fraction == pytest.approx(1 - tokens / (480 * 256))
    assert report.documents_per_row == pytest.approx(np.mean([len(row) for row in rows]))
    images = [sum(int(plan.sources[p.source_no].num_images[p.sample_no]) for p in row) for row in rows]
    assert report.images_per_row == pytest.approx(np.mean(images))
    assert report.max_images_per_row == max(images)
    assert report.max_task_error_rows <= 1
    assert 1 <= report.rank_image_imbalance < 1.1
    assert 1 <= report.micro_batch_image_imbalance < 1.3
    assert report.measured_steps == report.num_steps == 30
    assert json.loads(json.dumps(asdict(report)))["digest"] == plan.digest


def test_sources_are_told_with_shares_and_epochs():
    plan = plan_of(short_sources())
    report = report_plan(plan, 60)
    assert [source.name for source in report.sources] == ["gen", "text", "und"]
    assert [source.planned_share for source in report.sources] == pytest.approx([0.5, 0.3, 0.2])
    for number, told in enumerate(report.sources):
        assert told.realised_share == pytest.approx(told.planned_share, abs=0.005)
        assert 0 < told.max_off_share <= plan.streams[number].longest
        planned = [p for row_no in range(960) for p in plan.row(row_no) if p.source_no == number]
        assert told.documents == len(planned)
        assert told.epochs == pytest.approx(len(planned) / told.documents_per_epoch)
        given = np.cumsum(
            [
                sum(p.source_no == number for row_no in range(16 * step, 16 * step + 16) for p in plan.row(row_no))
                for step in range(60)
            ]
        )
        whole = [epoch * told.documents_per_epoch for epoch in range(1, int(told.epochs) + 1)]
        assert list(told.epoch_ends) == [1 + int(np.argmax(given >= count)) for count in whole]
        assert (told.stage_tokens, told.stage_epochs) == (told.tokens, told.epochs)
    assert any(told.epoch_ends for told in report.sources)


@pytest.mark.parametrize("unit", RatioUnit)
def test_a_stage_is_projected_from_its_first_steps(unit):
    plan = plan_of(short_sources(), ratio_unit=unit)
    done = []
    whole = report_plan(plan, 320)
    part = report_plan(plan, 320, max_steps=30, progress=lambda *state: done.append(state))
    assert (part.measured_steps, part.num_steps) == (32, 320)
    assert done == [(8, 32), (16, 32), (24, 32), (32, 32)]
    assert part.tokens == report_plan(plan, 32).tokens
    assert part.stage_tokens == pytest.approx(whole.tokens, rel=0.01)
    for projected, counted in zip(part.sources, whole.sources, strict=True):
        assert projected.stage_tokens == pytest.approx(counted.tokens, rel=0.03)
        assert projected.stage_epochs == pytest.approx(counted.epochs, rel=0.03)
        assert len(projected.epoch_ends) == pytest.approx(len(counted.epoch_ends), abs=1)
        differences = np.subtract(projected.epoch_ends[:8], counted.epoch_ends[: len(projected.epoch_ends[:8])])
        assert np.abs(differences).max() <= 8


def changed(name, **fields):
    return [replace(taken, **fields) if taken.name == name else taken for taken in short_sources()]


@pytest.mark.parametrize("max_steps", [0, 16])
def test_events_come_at_the_window_that_they_hold_from(max_steps):
    sources = changed("gen", schedule=(WeightPoint(at=17, weight=1), WeightPoint(at=64, weight=2)))
    report = report_plan(plan_of(sources), 100, max_steps=max_steps)
    assert [(event.after_step, event.source, event.what) for event in report.events] == [
        (24, "gen", "weight becomes 1"),
        (64, "gen", "weight becomes 2"),
    ]
    assert all(event.is_projected == bool(max_steps) for event in report.events)
    # 3 windows at 1/2, 5 at 1/6, 4.5 at 2/7
    gen = report.sources[0]
    share = (3 / 2 + 5 / 6 + 4.5 * 2 / 7) / 12.5
    assert gen.stage_tokens / report.stage_tokens == pytest.approx(share, abs=0.015)


def test_points_by_tokens_are_told_in_steps():
    sources = changed("gen", schedule=(WeightPoint(at=100_000, weight=0),))
    counted = report_plan(plan_of(sources, schedule_unit=ScheduleUnit.token), 100)
    projected = report_plan(plan_of(sources, schedule_unit=ScheduleUnit.token), 100, max_steps=8)
    assert [event.after_step for event in counted.events] == [32], "25 steps of 4096 tokens, then the window's end"
    assert [event.after_step for event in projected.events] == [32]


@pytest.mark.parametrize("max_steps", [0, 40])
def test_limits_are_told(max_steps):
    leaving = changed("und", max_epochs=2, on_exhausted=Exhausted.reweight)
    report = report_plan(plan_of(leaving), 200, max_steps=max_steps)
    assert [(event.source, event.what) for event in report.events] == [
        ("und", "has given its max_epochs=2 and leaves the mixture")
    ]
    assert report.events[0].after_step == pytest.approx(110, abs=9)
    assert report.sources[2].stage_epochs == pytest.approx(2)
    stopping = changed("und", max_epochs=2, on_exhausted=Exhausted.stop)
    plan = plan_of(stopping)
    report = report_plan(plan, 200, max_steps=max_steps)
    assert report.num_steps == pytest.approx(plan.ends_at_step(200), abs=8 if max_steps else 0)
    assert report.events[-1].after_step == report.num_steps
    assert report.events[-1].what.startswith("ends")
    assert report.sources[2].stage_epochs <= 2


def test_a_plan_without_a_step_is_refused():
    sources = changed("und", max_epochs=0.01, on_exhausted=Exhausted.stop)
    with pytest.raises(UserError, match="has no step: source 'und' has given 0 of 12 documents"):
        report_plan(plan_of(sources), 10)
