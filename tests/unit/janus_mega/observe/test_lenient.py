"""A write that fails is told once, and leaves nothing behind that hides the next."""

import errno
import json
import os
from pathlib import Path

import pytest

from janus_mega.observe import lenient
from janus_mega.observe.json_lines import read_lines
from janus_mega.observe.lenient import Lenient, LenientLines, write_whole
from tests.support.full_disk import fill, largest_file


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failures_are_told_once_until_it_goes_again(caplog: pytest.LogCaptureFixture) -> None:
    writes = Lenient("the file")
    answers = [writes.attempt(write) for write in (list, full, full, list, list, full)]
    assert answers == [True, False, False, True, True, False]
    said = [record.getMessage() for record in caplog.records]
    assert [line.split("(")[0] for line in said] == [
        "the file: could not be written ",
        "the file: is written again; 2 writes before are missing",
        "the file: could not be written ",
    ]
    assert "No space left on device" in said[0] and "training goes on" in said[0]


def test_what_catches_up_misses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    writes = Lenient("the file", catches_up=True)
    assert [writes.attempt(write) for write in (full, list)] == [False, True]
    assert caplog.messages[-1] == "the file: is written again; nothing is missing"


def test_a_defect_is_no_full_disk() -> None:
    with pytest.raises(KeyError):
        Lenient("the file").attempt(lambda: {}["missing"])


def test_lines_are_whole_on_a_disk_that_was_full_for_a_while(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = LenientLines(path)
    lines.append([{"step": 1, "text": "a" * 50}])
    with largest_file(100):
        lines.append([{"step": 2, "text": "b" * 50}])
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    lines.append([{"step": 3}, {"step": 4}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]


@pytest.mark.parametrize("torn", ["", '{"st', '{"step": 1}\n{"step": 2', '{"step": 1}\n'])
def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(torn)
    lines = LenientLines(path)
    lines.append([{"step": 3}])
    lines.append([{"step": 4}])
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1] * torn.count("\n") + [3, 4]


def test_half_a_line_that_could_not_be_cut_off_at_once_is_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = LenientLines(tmp_path / "lines.jsonl")
    lines.append([{"step": 1}])
    with largest_file(20), monkeypatch.context() as patch:
        patch.setattr(lenient, "_cut_torn_line", lambda _: full())
        lines.append([{"step": 2, "text": "b" * 50}])
    lines.append([{"step": 3}])
    assert [row["step"] for row in read_lines(tmp_path / "lines.jsonl")] == [1, 3]
    assert (tmp_path / "lines.jsonl").read_text().count("\n") == 2


def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "told.json"
    write_whole(path, "before")
    fill(tmp_path / "told.json.tmp")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "after")
    assert [entry.name for entry in tmp_path.iterdir()] == ["told.json"]
    assert path.read_text() == "before"
