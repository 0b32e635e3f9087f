"""Advice on row lengths: what it looks at, what it prefers, what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.advise import POINTS_PER_LENGTH, advise_seq_len, around
from data_pipeline.spec import Captions, DataSpec, RatioUnit, Task, WeightPoint
from tests.support.histograms import plan_of, short_sources, source


def spec_of(seq_len, **changes):
    return DataSpec(seq_len=seq_len, **{"window_rows": 64, **changes})


def drawings(length=100, count=600, **fields):
    return replace(source("drawings", Task.generation, 1, [length] * count), **fields)


def test_lengths_from_half_to_twice_the_length_asked_for():
    assert around(4096) == list(range(2048, 8193, 64))
    assert around(256) == [128, 192, 256, 320, 384, 448, 512]
    assert 100 in around(100)
    assert around(32768)[0] == 16384
    assert len(around(32768)) <= 100


def test_padding_is_that_of_the_packer():
    advice = advise_seq_len(spec_of(256), [drawings()], 16, [256, 320, 448, 512])
    found = {row.seq_len: (row.documents_per_row, row.padding_fraction) for row in advice.rows}
    assert found == {
        256: (2, pytest.approx(56 / 256)),
        320: (3, pytest.approx(20 / 320)),
        448: (4, pytest.approx(48 / 448)),
        512: (5, pytest.approx(12 / 512)),
    }
    plan = plan_of([drawings()], seq_len=320, window_rows=64)
    assert found[320][1] == pytest.approx(1 - plan.window(0).length.sum() / (64 * 320))


def test_the_advised_length_has_the_least_sum_of_padding_and_distance():
    advice = advise_seq_len(spec_of(256), [drawings()], 16, [256, 320, 448, 512])
    costs = {row.seq_len: row.cost for row in advice.rows}
    assert costs[256] == pytest.approx(100 * 56 / 256)
    assert costs[512] == pytest.approx(100 * 12 / 512 + POINTS_PER_LENGTH)
    assert advice.advised == min(costs, key=lambda length: costs[length]) == 512
    # Rows twice as long are not worth a point of padding.
    assert advise_seq_len(spec_of(256), [drawings(63)], 16, [256, 512]).advised == 256


def test_lengths_too_short_for_a_document_are_not_offered():
    longer = source("long", Task.understanding, 1, [300] * 90, [1] * 90)
    advice = advise_seq_len(spec_of(256), [drawings(), longer], 16)
    assert advice.shortest == 300
    assert [row.seq_len for row in advice.rows] == [320, 384, 448, 512]
    assert all(row.images_per_row > 0 for row in advice.rows)
    with pytest.raises(UserError, match=r"data.seq_len=128: .* has 300 tokens, .* ask for 320 or more"):
        advise_seq_len(spec_of(128), [longer], 16)


def test_long_texts_are_cut_at_every_length():
    prose = source("prose", Task.text, 1, [5000] * 90, can_cut=True)
    advice = advise_seq_len(spec_of(256), [prose], 16, [250, 256])
    assert advice.shortest == 1
    assert next(row.padding_fraction for row in advice.rows if row.seq_len == 250) <= 0.005


def test_masks_captions_weights_and_units_are_those_of_training():
    lengths = np.where(np.arange(600) % 2, 100, 120)
    left_out = lengths == 120
    masked = replace(source("drawings", Task.generation, 1, lengths), left_out=left_out)
    assert advise_seq_len(spec_of(320), [masked], 16, [320]).rows[0].documents_per_row == 3

    numbers = np.tile([0, 1], 300).astype(np.uint8)
    uids = np.repeat(np.arange(300, dtype=np.uint64), 2)[:, None] * np.ones(2, np.uint64)
    one = replace(drawings(), captions=Captions.one, caption_number=numbers, uids=uids)
    assert advise_seq_len(spec_of(320), [one], 16, [320]).rows[0].documents_per_row == 3

    later = source("later", Task.text, 0, [320] * 90)
    later = replace(later, schedule=(WeightPoint(at=10, weight=1),))
    assert advise_seq_len(spec_of(320), [drawings(), later], 16, [320]).rows[0].documents_per_row == 3

    for unit in RatioUnit:
        for temperature in (0.0, 2.0):
            spec = spec_of(256, ratio_unit=unit, temperature=temperature)
            plan = plan_of(short_sources(), window_rows=64, ratio_unit=unit, temperature=temperature)
            row = advise_seq_len(spec, short_sources(), 16, [256]).rows[0]
            assert row.padding_fraction == pytest.approx(plan_padding(plan), abs=0.02)
            assert row.documents_per_row == pytest.approx(len(plan.window(0).length) / 64, rel=0.1)


def plan_padding(plan):
    return 1 - plan.window(0).length.sum() / (plan.window_rows * plan.seq_len)


def test_progress_is_told():
    told = []
    advise_seq_len(spec_of(256), [drawings()], 16, [256, 320], lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
