"""`data prepare` as a command: its options reach the work, jobs of an array add up, refusals are one line."""

import os
import subprocess
import sys

import pytest

from data_pipeline.manifest import open_source
from data_pipeline.prepare.options import Counts
from janus_mega.cli import main as cli
from janus_mega.cli.show import tally_note
from tests.support.raw import train_tokenizer, write_raw


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Raw texts and a tokenizer, as the arguments of a command."""
    root = tmp_path_factory.mktemp("given")
    tokenizer = train_tokenizer(root)
    return [str(write_raw(root / "raw")["text"]), "--text-tokenizer", str(tokenizer.path)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["janus-mega", "data", "prepare", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


def test_help_groups_the_options(run):
    code, out, _ = run("--help")
    headings = ["Arguments:", "Options:", "Tokenizers:", "Reading the input:", "Making samples:", "Sharing the work:"]
    places = [out.index(heading) for heading in headings]
    assert code == 0 and places == sorted(places)
    assert out.index("--workers") > out.index("Sharing the work:") > out.index("--crops") > out.index("--format")


def test_jobs_of_an_array_add_up_and_the_last_tells_all(run, given, tmp_path):
    arguments = ["text", *given, "--out", str(tmp_path / "out"), "--samples-per-shard", "5", "--tasks", "3", "--task"]
    code, out, _ = run(*arguments, "2")
    assert code == 0 and "2 shards; the last task to end writes the index" in out
    assert run(*arguments, "0")[0] == 0
    code, out, _ = run(*arguments, "1")
    assert code == 0 and "12 samples of kind text in 3 shards" in out
    assert len(open_source(tmp_path / "out")) == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "3"], "data prepare --tasks 3 needs --task, 0 to 2"),
        (["--tasks", "3", "--task", "3"], "task 3 of 3 does not exist"),
        (["--workers", "0"], "workers = 0 must be at least 1"),
        (["--image-tokenizer", "x"], "--image-tokenizer is for t2i"),
    ],
)
def test_refusals_are_one_line(run, given, tmp_path, arguments, words):
    code, _, err = run("text", *given, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2 and words in err and err.count("\n") == 1


def test_ctrl_c_ends_in_one_line(run, given, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.prepare.text.prepare_text", interrupted)
    code, _, err = run("text", *given, "--out", str(tmp_path / "out"))
    assert code == 2 and "interrupted; the same command continues" in err and err.count("\n") == 1


def test_progress_tells_rates_and_rejects():
    made = Counts(records=2000, samples=1900, text_tokens=2_500_000, images=0)
    made.rejects.update({"bad_record": 3, "empty_text": 1200})
    assert tally_note(made, 10.0) == "200 records/s, 250k tokens/s, left out: 3 bad_record, 1,200 empty_text"
    assert tally_note(Counts(records=50, images=50), 100.0) == "0.5 records/s, 0.5 images/s"
    assert tally_note(Counts(), 10.0) == ""


def test_the_array_script_hands_over_its_numbers(repository, tmp_path):
    """Run with a stand-in for the command; the array is 4-9 of six tasks."""
    (tmp_path / "janus-mega").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "janus-mega").chmod(0o755)
    array = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "6"}
    script = repository / "slurm" / "prepare_array.sbatch"
    environment = {**os.environ, **array, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(script), "text", "a b.txt", "--out", "o"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.splitlines() == ["data", "prepare", *command[2:], "--tasks", "6", "--task", "2"]
