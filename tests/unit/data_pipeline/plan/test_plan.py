"""The compiled plan: complete, exact, dense, and a pure function of its inputs."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.difference import difference
from data_pipeline.plan.plan import compile_plan
from data_pipeline.plan.schedule import WHOLE
from data_pipeline.schema import TaskId
from data_pipeline.spec import DataSpec, ImageGeometry, RatioUnit, Task, Template
from tests.support.histograms import long_sources, plan_of, short_sources, source


def rows_of(plan, num_rows, first=0):
    return [plan.row(row_no) for row_no in range(first, first + num_rows)]


def tokens_by_task(plan, row):
    tokens = np.zeros(3, np.int64)
    for planned in row:
        tokens[TaskId[plan.sources[planned.source_no].task.name]] += planned.stop - planned.start
    return tokens


@pytest.mark.parametrize("unit", RatioUnit)
def test_every_document_comes_once_per_epoch(unit):
    plan = plan_of(short_sources(), ratio_unit=unit)
    rows = rows_of(plan, 24 * 128)
    seen = Counter((p.source_no, p.epoch, p.sample_no, p.start) for row in rows for p in row)
    assert set(seen.values()) == {1}
    for number, stream in enumerate(plan.streams):
        epochs = Counter(epoch for source_no, epoch, *_ in seen if source_no == number)
        assert max(epochs) >= 1, "the test must see an epoch end"
        for epoch in range(max(epochs)):
            assert epochs[epoch] == len(stream.table)


def test_long_texts_come_in_pieces_that_cover_them():
    plan = plan_of(short_sources())
    rows = rows_of(plan, 24 * 128)
    number = next(n for n, source in enumerate(plan.sources) if source.name == "text")
    pieces = [p for row in rows for p in row if p.source_no == number and p.epoch == 0]
    by_sample: dict[int, list] = {}
    for piece in pieces:
        by_sample.setdefault(piece.sample_no, []).append((piece.start, piece.stop))
    lengths = plan.sources[number].lengths
    assert any(len(found) > 1 for found in by_sample.values())
    for sample, found in by_sample.items():
        found.sort()
        assert found[0][0] == 0
        assert found[-1][1] == lengths[sample]
        assert all(left[1] == right[0] for left, right in pairwise(found))


@pytest.mark.parametrize("global_batch_size", [8, 64])
@pytest.mark.parametrize("sources", [short_sources(), short_sources(text=False)], ids=["mix", "stage1"])
def test_every_task_keeps_its_share_in_every_step(sources, global_batch_size):
    plan = plan_of(sources, global_batch_size=global_batch_size)
    quota = np.zeros(3)
    for share, taken in zip(plan.mixture.shares(0), plan.sources, strict=True):
        quota[TaskId[taken.task.name]] += share / WHOLE
    rows = rows_of(plan, 4 * 128)
    for first in range(0, len(rows), global_batch_size):
        tokens = sum(tokens_by_task(plan, row) for row in rows[first : first + global_batch_size])
        assert np.abs(tokens - quota * tokens.sum()).max() <= plan.seq_len


def padding(plan, num_windows):
    filled = sum(int(plan.window(number).length.sum()) for number in range(num_windows))
    return 1 - filled / (num_windows * plan.window_rows * plan.seq_len)


@pytest.mark.parametrize("text", [True, False], ids=["mix", "stage1"])
def test_short_documents_leave_next_to_no_padding(text):
    assert padding(plan_of(short_sources(text=text), window_rows=1024), 3) <= 0.002
    assert padding(plan_of(short_sources(text=text), window_rows=128), 8) <= 0.01


@pytest.mark.parametrize("mix", ["stage2", "stage3"])
def test_long_mixes_leave_at_most_a_thousandth_of_padding(mix):
    plan = plan_of(long_sources(mix), seq_len=4096, global_batch_size=512, window_rows=4096)
    assert padding(plan, 2) <= 0.001


def test_images_are_counted_per_row():
    plan = plan_of(short_sources())
    rows = rows_of(plan, 256)
    for step in (0, 5, 9):
        counted = [
            sum(int(plan.sources[p.source_no].num_images[p.sample_no]) for p in row)
            for row in rows[step * 16 : step * 16 + 16]
        ]
        assert plan.num_images(step).tolist() == counted
        placed = plan.place(step, 2, 4)
        assert sorted(placed.ravel().tolist()) == list(range(step * 16, step * 16 + 16))


def test_rows_do_not_depend_on_who_asked_before():
    forward, jumping = plan_of(short_sources()), plan_of(short_sources())
    expected = rows_of(forward, 6 * 128)
    for row_no in (700, 3, 400, 767, 130, 0, 699):
        assert jumping.row(row_no) == expected[row_no]
    assert pickle.loads(pickle.dumps(jumping)).row(650) == expected[650]


def test_a_cursor_replaces_the_windows_before_it():
    plan = plan_of(short_sources())
    cursor = json.loads(json.dumps(plan.cursor_at(50)))
    assert len(json.dumps(cursor)) < 400
    resumed = plan_of(short_sources())
    resumed.restore(cursor)
    assert resumed.row(50 * 16 + 3) == plan.row(50 * 16 + 3)
    assert len(resumed._cursors) <= 3, "windows before the cursor were compiled"
    with pytest.raises(UserError, match=r"belongs to plan .* this run's plan is"):
        plan_of(short_sources(), seed=1).restore(cursor)


def test_a_global_batch_larger_than_a_window_widens_it():
    plan = plan_of(short_sources(), global_batch_size=200, window_rows=128)
    assert plan.window_rows == 200
    assert len(rows_of(plan, 200)) == 200


def changed(sources, which, **fields):
    return [replace(taken, **fields) if taken.name == which else taken for taken in sources]


@pytest.mark.parametrize(
    ("what", "plan"),
    [
        ("seed", lambda: plan_of(short_sources(), seed=1)),
        ("seq_len", lambda: plan_of(short_sources(), seq_len=257)),
        ("window", lambda: plan_of(short_sources(), window_rows=256)),
        ("batch", lambda: plan_of(short_sources(), global_batch_size=32)),
        ("unit", lambda: plan_of(short_sources(), ratio_unit=RatioUnit.samples)),
        ("dropout", lambda: plan_of(short_sources(), guidance_dropout=0.2)),
        ("template", lambda: plan_of(short_sources(), template=Template.deepseek_old)),
        ("geometry", lambda: plan_of(short_sources(), geometry=ImageGeometry(codebook_size=7))),
        ("weight", lambda: plan_of(changed(short_sources(), "gen", weight=4))),
        ("digest", lambda: plan_of(changed(short_sources(), "gen", digest="other"))),
        ("task", lambda: plan_of(changed(short_sources(), "und", task=Task.text))),
        ("name", lambda: plan_of(changed(short_sources(), "gen", name="generation"))),
        ("left out", lambda: plan_of(changed(short_sources(), "gen", weight=0))),
        ("lengths", lambda: plan_of(changed(short_sources(), "gen", lengths=short_sources()[1].lengths[::-1]))),
        ("images", lambda: plan_of(changed(short_sources(), "und", num_images=np.zeros(1200, np.uint8)))),
    ],
)
def test_the_digest_changes_with_every_input(what, plan):
    ours, theirs = plan_of(short_sources()), plan()
    assert theirs.digest != ours.digest
    assert len(difference(ours.identity, theirs.identity)) >= 1
    assert all("here" in line for line in difference(ours.identity, theirs.identity))


def test_the_digest_ignores_what_changes_nothing():
    plan = plan_of(short_sources())
    same = [
        plan_of(short_sources()[::-1]),
        plan_of(short_sources(), num_workers=3),
        plan_of(short_sources(), cache_mib=0),
        plan_of(changed(short_sources(), "gen", path="elsewhere")),
        plan_of([*short_sources(), source("unused", Task.text, 0, [5])]),
    ]
    for other in same:
        assert other.digest == plan.digest
        assert difference(plan.identity, other.identity) == []
        assert other.row(200) == plan.row(200)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (list, "none of 0 sources has a weight above 0"),
        (lambda: [source("a", Task.text, 0, [5])], "none of 1 sources has a weight above 0"),
        (lambda: [source("a", Task.text, -1, [5])], "source 'a': weight -1 is no share"),
        (lambda: [source("a", Task.text, float("nan"), [5])], "weight nan is no share"),
        (
            lambda: [source("a", Task.text, 3, [5]), source("b", Task.text, 1, [])],
            r"source 'b': holds 0 samples but is to fill 25.0% of the tokens \(weight 1 of 4\)",
        ),
    ],
)
def test_impossible_mixtures_are_refused_in_one_line(sources, message):
    with pytest.raises(UserError, match=message) as caught:
        compile_plan(DataSpec(seq_len=256), sources(), global_batch_size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "spec", "batch"),
    [
        ("data.seq_len=0", DataSpec(seq_len=0), 8),
        ("data.window_rows=0", DataSpec(window_rows=0), 8),
        ("global_batch_size=0", DataSpec(), 0),
    ],
)
def test_impossible_sizes_are_refused(field, spec, batch):
    with pytest.raises(UserError, match=f"{field} must be at least 1"):
        compile_plan(spec, short_sources(), global_batch_size=batch)


def test_a_tiny_source_is_repeated():
    plan = plan_of([source("tiny", Task.text, 1, [50, 60, 70]), source("other", Task.generation, 1, [30] * 400)])
    tiny = [p for row in rows_of(plan, 128) for p in row if plan.sources[p.source_no].name == "tiny"]
    counts = Counter(p.sample_no for p in tiny)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert max(p.epoch for p in tiny) > 50
