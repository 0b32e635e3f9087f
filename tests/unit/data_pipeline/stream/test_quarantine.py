"""The record of broken samples: once each, durable, counted over restarts."""

import json
from dataclasses import asdict, replace

import pytest

from data_pipeline.errors import UserError
from data_pipeline.schema import Hole
from data_pipeline.stream.quarantine import QUARANTINE_FILE, Quarantine, read_quarantine
from tests.support.full_disk import largest_file

HOLE = Hole(
    source="text", shard="/data/0.tar", offset=512, uid="0" * 32, row=17, step=2, reason="checksum", message="bad ö"
)


def holes(count):
    return [replace(HOLE, uid=f"{number:032x}") for number in range(count)]


def test_a_sample_is_recorded_once(run_dir):
    quarantine = Quarantine(run_dir, budget=100)
    assert quarantine.add(holes(2)) == holes(2)
    again = [replace(hole, row=99, step=12) for hole in holes(3)]
    assert quarantine.add(again) == again[2:]
    assert quarantine.add([replace(HOLE, source="pictures")]), "another source's copy is another sample"
    assert len(quarantine.holes) == 4 == len((run_dir / QUARANTINE_FILE).read_bytes().splitlines())


def test_nothing_broken_leaves_no_file(run_dir):
    assert Quarantine(run_dir, budget=0).add([]) == []
    assert not (run_dir / QUARANTINE_FILE).exists()
    assert read_quarantine(run_dir) == []


def test_a_resumed_run_goes_on_counting(run_dir):
    Quarantine(run_dir, budget=2).add(holes(2))
    resumed = Quarantine(run_dir, budget=2)
    assert resumed.holes == holes(2) == read_quarantine(run_dir)
    assert resumed.exceeded() is None
    resumed.add(holes(3))
    assert resumed.exceeded()
    assert [json.loads(line) for line in (run_dir / QUARANTINE_FILE).read_text().splitlines()] == [
        asdict(hole) for hole in holes(3)
    ]


@pytest.mark.parametrize("kept_bytes", [1, 30, 150])
def test_a_line_that_a_kill_cut_off_is_written_again(run_dir, kept_bytes):
    Quarantine(run_dir, budget=9).add(holes(2))
    path = run_dir / QUARANTINE_FILE
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:kept_bytes])
    resumed = Quarantine(run_dir, budget=9)
    assert resumed.holes == holes(1)
    resumed.add(holes(2))
    assert path.read_bytes() == first + b"\n" + second + b"\n"


@pytest.mark.parametrize("line", ["{", '{"source": "text"}', "[]", "7"])
def test_another_file_is_refused_with_its_line(run_dir, line):
    Quarantine(run_dir, budget=9).add(holes(1))
    path = run_dir / QUARANTINE_FILE
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"quarantine\.jsonl:2: no record of a broken sample") as caught:
        Quarantine(run_dir, budget=9)
    assert "\n" not in str(caught.value)


def test_the_budget_is_told_in_one_line(run_dir):
    quarantine = Quarantine(run_dir, budget=0)
    assert quarantine.exceeded() is None
    quarantine.add(holes(1))
    message = quarantine.exceeded()
    for part in (str(run_dir / QUARANTINE_FILE), "1 broken", "data.max_broken_samples=0", "janus-mega data verify"):
        assert part in message
    assert "\n" not in message


def test_holes_that_a_full_disk_did_not_take_count_and_are_written_later(run_dir):
    quarantine = Quarantine(run_dir, budget=2)
    quarantine.add(holes(1))
    with largest_file((run_dir / QUARANTINE_FILE).stat().st_size + 10), pytest.raises(OSError, match="too large"):
        quarantine.add(holes(3))
    assert quarantine.exceeded()
    quarantine.add([])
    assert read_quarantine(run_dir) == quarantine.holes == holes(3)
