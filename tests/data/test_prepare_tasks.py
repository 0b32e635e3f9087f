"""Tasks of prepare: the same bytes whoever does them and however often it is killed; two at one task do no harm."""

import hashlib
import json
import os
import signal
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.prepare.directory import ShardDirectory
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from tests.support.raw import ColourTokenizer, train_tokenizer, write_jsonl, write_raw

OPTIONS = PrepareOptions(samples_per_shard=2, record_size=3, encode_batch_size=2)
KINDS = ("text", "interleaved", "t2i")
NUM_KILLS = 24
LONGEST_S = 20.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("raw"), 13)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, raw, tokenizer):
    """Files of each kind, prepared undisturbed in one process."""
    out = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        prepare(kind, raw[kind], out / kind, tokenizer)
    return {kind: files_of(out / kind) for kind in KINDS}


def prepare(kind, inputs, out, tokenizer, progress=None, **changes):
    options = replace(OPTIONS, **changes)
    if kind == "text":
        return prepare_text([inputs], out, tokenizer, options=options, progress=progress)
    if kind == "interleaved":
        return prepare_interleaved([inputs], out, tokenizer, options=options, progress=progress)
    return prepare_t2i([inputs], out, tokenizer, ColourTokenizer(), options=options, progress=progress)


def files_of(directory):
    """sha256 of every file by its path below the directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def forked(call):
    """Runs a call in a forked process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        call()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid):
    """Exit status of a process that has ended, or None."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


def wait_all(pids):
    """Exit statuses, in order; whoever takes too long is killed."""
    deadline = time.monotonic() + LONGEST_S
    statuses = dict.fromkeys(pids)
    while None in statuses.values() and time.monotonic() < deadline:
        statuses |= {pid: ended(pid) for pid, status in statuses.items() if status is None}
        time.sleep(0.002)
    for pid, status in statuses.items():
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [statuses[pid] for pid in pids]


# ---- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_instants_it_continues_to_the_same_bytes(whole, raw, tokenizer, tmp_path, processes):
    """Real processes, SIGKILL, nothing simulated; with two of them at the same tasks one is left to be killed later."""
    random = np.random.default_rng(processes)
    kills = rounds = 0
    while kills < NUM_KILLS or rounds < len(KINDS):
        kind, out = KINDS[rounds % len(KINDS)], tmp_path / f"{rounds}"
        rounds += 1
        longest_s = 0.08
        while not (out / "janus.json").exists():
            alive = [forked(lambda: prepare(kind, raw[kind], out, tokenizer)) for _ in range(processes)]  # noqa: B023
            for pid in alive:
                time.sleep(random.uniform(0, longest_s))
                os.kill(pid, signal.SIGKILL)
            statuses = wait_all(alive)
            assert all(os.WIFSIGNALED(status) or status == 0 for status in statuses)
            kills += sum(os.WIFSIGNALED(status) for status in statuses)
            longest_s *= 1.05
        prepare(kind, raw[kind], out, tokenizer)  # what a kill right after the manifest left is removed
        assert files_of(out) == whole[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_several_at_the_same_tasks_do_no_harm(whole, raw, tokenizer, tmp_path, kind):
    for attempt in range(3):
        out = tmp_path / f"{attempt}"
        assert wait_all([forked(lambda: prepare(kind, raw[kind], out, tokenizer)) for _ in range(3)]) == [0, 0, 0]  # noqa: B023
        assert files_of(out) == whole[kind]


def test_jobs_that_end_together_leave_one_whole_directory(whole, raw, tokenizer, tmp_path):
    for attempt in range(3):
        out = tmp_path / f"{attempt}"
        calls = [lambda job=job: prepare("text", raw["text"], out, tokenizer, jobs=3, job=job) for job in range(3)]  # noqa: B023
        assert wait_all([forked(call) for call in calls]) == [0, 0, 0]
        assert files_of(out) == whole["text"]


def test_a_loser_whose_file_is_removed_by_the_winner_ends_well(whole, raw, tokenizer, tmp_path):
    """The slow process is at its first shard when another finishes the directory and clears up."""
    out = tmp_path / "out"

    def overtake(tally):
        if not (out / "janus.json").exists():
            assert wait_all([forked(lambda: prepare("text", raw["text"], out, tokenizer))]) == [0]

    class Slow:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer
            self.digest, self.vocab_size = tokenizer.digest, tokenizer.vocab_size

        def encode(self, text):
            overtake(None)
            return self.tokenizer.encode(text)

    report = prepare("text", raw["text"], out, Slow(tokenizer))
    assert report.num_samples == 13 and files_of(out) == whole["text"]


# ---- shared ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [2, 5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_jobs_writes_the_same_bytes(whole, raw, tokenizer, tmp_path, kind, jobs):
    missing = [
        prepare(kind, raw[kind], tmp_path / "out", tokenizer, jobs=jobs, job=job).num_shards_missing
        for job in np.random.default_rng(0).permutation(jobs).tolist()
    ]
    assert missing == sorted(missing, reverse=True) and missing[0] > 0 == missing[-1]
    assert files_of(tmp_path / "out") == whole[kind]


def test_an_unfinished_directory_is_no_source_and_any_job_finishes_it(whole, raw, tokenizer, tmp_path):
    out = tmp_path / "out"
    for job in (1, 2):
        prepare("text", raw["text"], out, tokenizer, jobs=3, job=job)
    with pytest.raises(UserError, match="prepare has not finished there"):
        open_source(out)
    report = prepare("text", raw["text"], out, tokenizer)
    assert (report.num_shards_kept, report.num_shards) == (4, 7) and files_of(out) == whole["text"]


def test_a_pool_writes_the_same_bytes_and_tells_all_it_makes(whole, raw, tokenizer, tmp_path):
    seen = []

    def watch(tally):
        seen.append((tally.done, tally.made.samples, tally.made.images))

    report = prepare("t2i", raw["t2i"], tmp_path / "out", tokenizer, watch, workers=2)
    assert files_of(tmp_path / "out") == whole["t2i"]
    assert seen[-1] == (13, report.num_samples, 13)
    assert seen == sorted(seen)


class Failing(ColourTokenizer):
    """Fails in a worker, in the way asked for."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def encode(self, images):
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("a defect")


@pytest.mark.parametrize(
    ("how", "error", "complaint"),
    [
        ("dies", UserError, r"worker \d+ was killed by signal 9 in task \d.*run the same command again"),
        ("defect", RuntimeError, "ZeroDivisionError: a defect"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told_and_the_rest_continues(
    whole, raw, tokenizer, tmp_path, how, error, complaint
):
    out = tmp_path / "out"
    with pytest.raises(error, match=complaint) as caught:
        prepare_t2i([raw["t2i"]], out, tokenizer, Failing(how), options=replace(OPTIONS, workers=2))
    assert error is RuntimeError or "\n" not in str(caught.value)
    prepare("t2i", raw["t2i"], out, tokenizer)
    assert files_of(out) == whole["t2i"]


def test_a_broken_record_in_a_worker_is_named(raw, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": "a"}] * 9)
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(UserError, match=r"r\.jsonl:10: .*--on-bad skip") as caught:
        prepare("text", path, tmp_path / "out", tokenizer, workers=2)
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_the_workers_and_leaves_a_directory_to_continue(whole, raw, tokenizer, tmp_path):
    out = tmp_path / "out"

    def interrupt(tally):
        if tally.made.records:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("t2i", raw["t2i"], out, tokenizer, progress=interrupt, workers=2)
    assert not list(out.rglob("*.tmp")), "a worker left something half-written"
    prepare("t2i", raw["t2i"], out, tokenizer)
    assert files_of(out) == whole["t2i"]


# ---- inputs and settings ---------------------------------------------------------------------------------------------


def begun(raw, tokenizer, out):
    """A directory in which one of three jobs has worked."""
    prepare("text", raw, out, tokenizer, jobs=3, job=0)


@pytest.mark.parametrize("finished", [False, True])
def test_an_input_that_changed_is_named(raw, tokenizer, tmp_path, finished):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file in (path, other):
        write_jsonl(file, [{"text": f"{n} of {file.name}"} for n in range(9)])
    jobs = 1 if finished else 3

    def again():
        prepare_text([path, other], tmp_path / "out", tokenizer, options=replace(OPTIONS, jobs=jobs))

    again()
    content = other.read_text()
    for changed, complaint in [
        (content.replace("7 of", "8 of"), "has other content of the same"),
        (content + "\n", "had .* bytes, now"),
    ]:
        other.write_text(changed)
        with pytest.raises(UserError, match=rf"input 'b\.jsonl' {complaint}") as caught:
            again()
        assert "\n" not in str(caught.value)
    other.write_text(content)
    again()
    with pytest.raises(UserError, match=r"input 'b\.jsonl' is no longer given \(2 files then, 1 now\)"):
        prepare("text", path, tmp_path / "out", tokenizer, jobs=jobs)


def test_inputs_may_move_between_two_calls(raw, tokenizer, tmp_path):
    here, there = write_jsonl(tmp_path / "1" / "a.jsonl", [{"text": "x"}] * 5), tmp_path / "2" / "a.jsonl"
    begun(here, tokenizer, tmp_path / "out")
    there.parent.mkdir()
    here.rename(there)
    assert prepare("text", there, tmp_path / "out", tokenizer).num_shards_kept == 1


def test_other_libraries_may_not_continue_but_may_open_what_is_finished(raw, tokenizer, tmp_path, monkeypatch):
    prepare("t2i", raw["t2i"], tmp_path / "begun", tokenizer, jobs=2)
    prepare("t2i", raw["t2i"], tmp_path / "finished", tokenizer)
    made = open_source(tmp_path / "finished").manifest.image_tokenizer.preprocessing
    assert "short side 16, middle of the long side" in made and "Pillow" in made and "simplejpeg" in made
    monkeypatch.setattr("PIL.__version__", "99.1")
    with pytest.raises(UserError, match=r"begun with .* Pillow 99\.1"):
        prepare("t2i", raw["t2i"], tmp_path / "begun", tokenizer)
    prepare("t2i", raw["t2i"], tmp_path / "finished", tokenizer)


def test_a_shard_that_was_damaged_before_the_end_is_made_again(whole, raw, tokenizer, tmp_path):
    out = tmp_path / "out"
    begun(raw["text"], tokenizer, out)
    tar = out / "shards" / "000003.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert prepare("text", raw["text"], out, tokenizer).num_shards_kept == 2
    assert files_of(out) == whole["text"]


def test_parts_of_another_command_in_the_same_directory_are_not_joined(raw, tokenizer, tmp_path):
    """Two commands that began at the same instant: the later prepare.json wins, the earlier's parts do not count."""
    out = tmp_path / "out"
    begun(raw["text"], tokenizer, out)
    begun(raw["text"], tokenizer, tmp_path / "same")
    part = out / "parts" / "000000.json"
    part.write_text(json.dumps({**json.loads(part.read_bytes()), "settings": "another"}))
    assert prepare("text", raw["text"], out, tokenizer).num_shards_kept == 2
    assert len(open_source(out)) == 13


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"jobs": 3, "job": 3}, "task 3 of 3 does not exist"), ({"workers": 0}, "workers = 0"), ({"crops": 0}, "crops")],
)
def test_numbers_out_of_range_are_refused(raw, tokenizer, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        prepare("text", raw["text"], tmp_path / "out", tokenizer, **changes)
    assert not (tmp_path / "out").exists()


def test_a_name_that_belongs_to_nobody_is_no_half_written_file(tmp_path):
    (tmp_path / "mine.tmp").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*'mine\.tmp'"):
        ShardDirectory(tmp_path, {})
    assert Path(tmp_path / "mine.tmp").exists()
