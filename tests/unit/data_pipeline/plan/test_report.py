"""What a plan says of itself before anything runs."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from data_pipeline.plan.report import report_plan
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
    assert json.loads(json.dumps(asdict(report)))["digest"] == plan.digest


def test_sources_are_told_with_shares_and_epochs():
    plan = plan_of(short_sources())
    report = report_plan(plan, 60)
    assert [source.name for source in report.sources] == ["gen", "text", "und"]
    assert [source.planned_share for source in report.sources] == [0.5, 0.3, 0.2]
    for number, told in enumerate(report.sources):
        assert told.realised_share == pytest.approx(told.planned_share, abs=0.005)
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
        assert list(told.wraps_at_steps) == [int(np.argmax(given >= count)) for count in whole]
    assert any(told.wraps_at_steps for told in report.sources)
