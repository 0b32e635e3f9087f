"""A directory for every start of a run: how it began, how it ended, and no secret in it."""

import json
import subprocess
import threading
from pathlib import Path

import pytest

from janus_mega.observe import attempts
from janus_mega.observe.attempts import recorded_attempt
from tests.support.full_disk import fill


def read(run_dir: Path, number: int, name: str) -> dict:
    return json.loads((run_dir / "attempts" / f"{number:04d}" / name).read_text(encoding="utf-8"))


def test_every_start_has_its_directory(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setattr("sys.argv", ["janus-mega", "train", "run/tiny_cpu.yaml"])
    with recorded_attempt(run_dir, enabled=True) as attempt, attempt.span("build"):
        assert read(run_dir, 1, "command.json")["ended_s"] is None
    with pytest.raises(KeyError), recorded_attempt(run_dir, enabled=True) as attempt, attempt.span("train"):
        raise KeyError
    first, second = (read(run_dir, number, "command.json") for number in (1, 2))
    assert first["argv"] == ["janus-mega", "train", "run/tiny_cpu.yaml"]
    assert (first["outcome"], second["outcome"]) == ("finished", "KeyError")
    assert first["started_s"] <= first["ended_s"] <= second["ended_s"]
    assert first["environment"]["NCCL_DEBUG"] == "WARN" and "secret" not in json.dumps(first)
    assert read(run_dir, 1, "versions.json")["torch"]
    spans = (run_dir / "attempts/0002/spans.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in spans] == ["train", "attempt"]


def test_the_checkout_is_told_by_commit_and_difference(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    module = root / "janus_mega/observe/attempts.py"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1\n", encoding="utf-8")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    module.write_text("x = 2\n", encoding="utf-8")
    monkeypatch.setattr(attempts, "__file__", str(module))
    with recorded_attempt(run_dir, enabled=True):
        pass
    assert read(run_dir, 1, "command.json")["commit"] == git("rev-parse", "HEAD")
    assert "+x = 2" in (run_dir / "attempts/0001/diff.patch").read_text(encoding="utf-8")


def test_other_ranks_write_nothing(run_dir: Path) -> None:
    with recorded_attempt(run_dir, enabled=False) as attempt, attempt.span("build"):
        pass
    assert list(run_dir.iterdir()) == []


def test_starts_at_one_time_get_directories_of_their_own(run_dir: Path) -> None:
    barrier, numbers = threading.Barrier(8), []

    def begin() -> None:
        barrier.wait()
        with recorded_attempt(run_dir, enabled=True) as attempt:
            numbers.append(attempt.number)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_an_end_that_was_meant_is_told_in_words(run_dir: Path) -> None:
    class Stopped(Exception):
        exit_code = 75

    with pytest.raises(Stopped), recorded_attempt(run_dir, enabled=True):
        raise Stopped("step 7 is saved")
    assert read(run_dir, 1, "command.json")["outcome"] == "Stopped: step 7 is saved"


def fill_attempt(run_dir: Path) -> None:
    directory = run_dir / "attempts/0001"
    fill(directory / "spans.jsonl")
    fill(directory / "command.json.tmp")


def test_a_full_disk_leaves_the_end_as_it_is(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stopped(Exception):
        exit_code = 75

    def train() -> None:
        with recorded_attempt(run_dir, enabled=True) as attempt, attempt.span("train"):
            fill_attempt(run_dir)
            raise Stopped

    with pytest.raises(Stopped):
        train()
    assert read(run_dir, 1, "command.json")["ended_s"] is None
    told = [record.getMessage().split(": could not be written")[0] for record in caplog.records]
    assert [Path(what).name for what in told] == ["spans.jsonl", "command.json"]


def test_a_full_disk_makes_no_failure_of_a_run_that_is_done(run_dir: Path) -> None:
    with recorded_attempt(run_dir, enabled=True) as attempt:
        fill_attempt(run_dir)
        with attempt.span("train"):
            pass
