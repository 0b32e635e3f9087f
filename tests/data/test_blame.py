"""What was in a batch, when a sample was used, and the batch made again: compared with rows really read."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.explain.blame import Layout, blame_step, find_uses, samples_of
from data_pipeline.explain.replay import logged_hashes, replay_step, why_different
from data_pipeline.plan.difference import difference
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.uid import uid_words
from tests.support.shards import make_shards

# Three workers on two cores are slow, not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize("step", [1, 2, 9])
def test_a_step_is_blamed_on_what_its_rows_hold(shards, step):
    data = shards.open()
    documents = blame_step(data, step)
    rows = range((step - 1) * 8, step * 8)
    assert sorted({document.row for document in documents}) == list(rows)
    dataset = RowDataset(data)
    for row_no in rows:
        mine = [document for document in documents if document.row == row_no]
        row, planned = dataset[row_no], data.plan.row(row_no)
        assert np.diff(row.cu_seqlens).tolist()[: len(mine)] == [document.tokens for document in mine]
        assert len(row.pixel_values) == sum(document.images_understood for document in mine)
        assert [d.dropped_prompt for d in mine] == [dataset.drops_prompt(p) for p in planned]
        assert [(d.sample, d.epoch, d.start) for d in mine] == [(p.sample_no, p.epoch, p.start) for p in planned]


def test_the_place_that_is_named_holds_the_sample(shards):
    data = shards.open()
    sources = {spec.name: source for spec, source in zip(data.plan.sources, data.sources, strict=True)}
    for document in blame_step(data, 3):
        source = sources[document.source]
        with Path(document.shard).open("rb") as tar:
            content = os.pread(tar.fileno(), int(source.length[document.sample]), document.offset)
        assert source.uid(document.sample) == document.uid
        if source.kind != "t2i":
            assert zlib.crc32(content) == source.crc[document.sample]
        if source.kind == "interleaved":
            assert content.startswith(document.key.encode() + b".")
        else:
            assert document.key.startswith("b00000")


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (2, 2), (4, 1), (8, 1)])
def test_ranks_and_micro_batches_are_those_that_load_the_row(shards, dp_size, micro_batch_size):
    data = shards.open()
    placed = data.plan.place(4, dp_size, micro_batch_size)
    for document in blame_step(data, 5, Layout(dp_size, micro_batch_size)):
        assert document.row in placed[document.dp_rank, document.micro_batch]


def test_every_use_of_a_sample_is_found_and_no_other(shards):
    data = shards.open()
    used = {}
    for step in range(1, 41):
        for document in blame_step(data, step):
            used.setdefault(document.uid, []).append((step, document.row, document.source, document.epoch))
    chosen = list(used)[:20] + list(used)[-20:]
    for uid in chosen:
        uses = find_uses(data, uid, range(1, 41))
        assert [(use.step, use.row, use.source, use.epoch) for use in uses] == used[uid]
    few = find_uses(data, chosen[0], range(5, 9))
    assert [use.step for use in few] == [step for step, *_ in used[chosen[0]] if 5 <= step < 9]


def test_a_search_begins_at_a_saved_position(shards):
    data = shards.open()
    cursor = json.loads(json.dumps(data.plan.cursor_at(30)))
    uid = blame_step(data, 31)[0].uid
    whole = [use for use in find_uses(data, uid, range(1, 41)) if use.step > 30]
    resumed = shards.open()
    resumed.plan.restore(cursor)
    resumed.plan._cursors.pop(0)  # nothing before the cursor can be compiled any more
    assert find_uses(resumed, uid, range(31, 41)) == whole


def test_all_captions_of_an_image_have_its_uid(shards):
    source = shards.open().sources[0]
    words = uid_words([source.uid(4)])[0]
    assert samples_of([source], source.uid(4))[0].tolist() == np.flatnonzero((source.uids == words).all(1)).tolist()


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda data: blame_step(data, 0), "steps are counted from 1"),
        (lambda data: blame_step(data, 1, Layout(3, 1)), "give another --world-size"),
        (lambda data: find_uses(data, "xyz", range(1, 3)), "give 32 hex digits"),
        (lambda data: find_uses(data, "0" * 32, range(1, 3)), "no sample of drawings, questions, text has it"),
        (lambda data: replay_step(data, 0), "steps are counted from 1"),
        (lambda data: replay_step(data, 1, Layout(3, 1)), "give another --world-size"),
    ],
)
def test_what_is_not_there_is_bad_input(shards, ask, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        ask(shards.open())
    assert "\n" not in str(error.value)


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dp_size", "micro_batch_size", "workers"), [(1, 1, 0), (2, 4, 1), (4, 2, 0), (8, 1, 3)])
def test_a_batch_has_one_hash_in_every_layout(shards, dp_size, micro_batch_size, workers):
    data = shards.open()
    if dp_size * max(workers, 1) > 8:
        workers = 0
    replay = replay_step(data, 7, Layout(dp_size, micro_batch_size), workers)
    assert replay.batch_hash == RowDataset(data).step_hash(6)
    assert (replay.step, replay.num_rows, replay.holes) == (7, 8, ())


def test_a_broken_sample_changes_the_hash_and_is_named(tmp_path):
    shards = make_shards(tmp_path, num_samples=8)
    data = shards.open()
    before = replay_step(data, 1)
    document = next(d for d in blame_step(data, 1) if d.source == "questions")
    with Path(document.shard).open("r+b") as tar:
        tar.seek(document.offset + 600)
        byte = tar.read(1)[0]
        tar.seek(document.offset + 600)
        tar.write(bytes([byte ^ 1]))
    after = replay_step(shards.open(), 1)
    assert after.batch_hash != before.batch_hash and after.holes
    why = why_different(after, before.batch_hash)
    assert "broken here, not there: questions sample " in why and "(checksum)" in why and "\n" not in why
    assert any(hole.uid == document.uid for hole in after.holes)
    assert "another version of the code" in why_different(after, before.batch_hash, run_holes=after.holes)
    assert "broken in the run, not there" in why_different(before, after.batch_hash, run_holes=after.holes)


def test_another_plan_is_the_reason_that_is_told_first(shards):
    replay = replay_step(shards.open(), 1)
    lines = difference(shards.open(seed=1).plan.identity, shards.open().plan.identity, ("here", "in the run"))
    why = why_different(replay, "ab", lines)
    assert "the data plan is another one: seed" in why and "\n" not in why
    assert "another version of the code" in why_different(replay, "ab")


def test_the_log_of_a_run_that_was_resumed_and_killed(tmp_path):
    path = tmp_path / "batches.jsonl"
    lines = [{"step": 1, "batch_hash": "a"}, {"step": 2, "batch_hash": "b"}, {"step": 2, "batch_hash": "c"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "bat')
    assert logged_hashes(path, 1) == ["a"] and logged_hashes(path, 2) == ["b", "c"]
    with pytest.raises(UserError, match="step 3 is not in it, it holds steps 1 to 2"):
        logged_hashes(path, 3)
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"batches\.jsonl:1: no line of a batch log"):
        logged_hashes(path, 1)
    with pytest.raises(UserError, match="cannot be read"):
        logged_hashes(tmp_path / "none", 1)
