"""Faults as users ask for them: what is understood, what is refused, and that each strikes once."""

import errno
import json
import os
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.checkpoint.disk import DISK
from janus_mega.train import faults
from janus_mega.train.faults import FAULTS_FILE, VARIABLE, Fault, parse_fault, read_faults


def test_a_fault_is_read_from_words() -> None:
    text = "rank=last, step=7,kind=gil,seconds=2.5,phase=eval"
    assert parse_fault(text, 4) == Fault(text, "gil", 3, 7, "eval", 2.5)
    assert parse_fault("kind=sigkill,rank=0", 1) == Fault("kind=sigkill,rank=0", "sigkill", 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sigkill", "is no fault; write one as rank=1,step=7"),
        ("rank=one,kind=sigkill", "is no fault"),
        ("kind=sigkill", "is no fault"),
        ("rank=0,kind=sigquit", "kind must be one of sigkill"),
        ("rank=0,kind=sigkill,phase=stop", "phase must be init, load, step, eval, save"),
        ("rank=0,kind=disk_full", "phase must be save"),
        ("rank=0,kind=nan,phase=save", "phase must be step"),
        ("rank=2,kind=sigkill", "rank must be below 2"),
        ("rank=0,kind=sigkill,setp=3", "setp is unknown"),
    ],
)
def test_what_is_no_fault_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_fault(text, 2)


def test_a_fault_strikes_once_in_a_run_directory(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "rank=0,step=2,kind=exception; rank=1,kind=exception,step=2;")
    mine = read_faults(run_dir, 0, 2)
    assert mine is not None
    mine.strike("step", 1)
    mine.strike("save", 2)
    with pytest.raises(RuntimeError, match="injected fault on rank 0"):
        mine.strike("step", 2)
    mine.strike("step", 2)
    (line,) = (run_dir / FAULTS_FILE).read_text().splitlines()
    assert json.loads(line) | {"time": 0} == {
        "fault": "rank=0,step=2,kind=exception", "rank": 0, "step": 2, "phase": "step", "time": 0,
    }  # fmt: skip
    again = read_faults(run_dir, 0, 2)
    assert again is not None
    again.strike("step", 2)
    other = read_faults(run_dir, 1, 2)
    assert other is not None
    with pytest.raises(RuntimeError, match="rank 1"):
        other.strike("step", 2)


def test_without_the_variable_there_is_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_faults(run_dir, 0, 1) is None
    monkeypatch.setenv(VARIABLE, "rank=0,kind=sigkill")
    asked = read_faults(run_dir, 0, 1)
    assert asked is not None and asked.disk() is DISK


def test_a_record_comes_before_the_fault(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setitem(
        faults._KINDS, "sigkill", lambda fault, engine: seen.append((run_dir / FAULTS_FILE).read_text())
    )
    monkeypatch.setenv(VARIABLE, "rank=0,kind=sigkill,phase=init")
    asked = read_faults(run_dir, 0, 1)
    assert asked is not None
    asked.strike("init")
    assert "kind=sigkill" in seen[0]


def test_a_record_that_was_cut_off_is_of_a_fault_that_did_not_strike(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck, left = "rank=0,kind=sigkill,step=1", "rank=0,kind=sigkill,step=2"
    monkeypatch.setenv(VARIABLE, f"{struck};{left}")
    (run_dir / FAULTS_FILE).write_text(json.dumps({"fault": struck}) + "\n" + json.dumps({"fault": left})[:-4])
    asked = read_faults(run_dir, 0, 1)
    assert asked is not None and [fault.text for fault in asked._waiting] == [left]


@pytest.mark.parametrize(
    ("kind", "code", "calls"), [("disk_full", errno.ENOSPC, ("write",)), ("disk_error", errno.EIO, ("write", "sync"))]
)
def test_a_disk_fails_in_the_save_of_its_step_alone(
    kind: str, code: int, calls: tuple[str, ...], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"rank=0,kind={kind},phase=save,step=4")
    asked = read_faults(run_dir, 0, 1)
    assert asked is not None
    disk = asked.disk()

    def write(step: int) -> None:
        folder = run_dir / f"step-{step:08d}"
        folder.mkdir(exist_ok=True)
        with disk.create(folder / f"file-{len(os.listdir(folder))}") as file:
            disk.write(file, b"content")
            disk.sync_file(file)

    write(2)
    with pytest.raises(OSError) as caught:
        write(4)
    assert caught.value.errno == code
    write(4)
    assert (run_dir / "step-00000004/file-1").read_bytes() == b"content"
