"""The comparison of training steps runs from documents to record, so that it is there when somebody needs figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run_tool(*words):
    command = [sys.executable, "-m", "tools.bench_train", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_tiny_run_agrees_on_losses_and_writes_its_record(tmp_path):
    done = run_tool("--tiny", "--force", "--hardware=a test", "--slug=test", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    record = next(tmp_path.glob("train_test_*.md")).read_text(encoding="utf-8")
    results = json.loads(next(tmp_path.glob("train_test_*.json")).read_text(encoding="utf-8"))
    assert "its figures say nothing" in record
    losses = results["losses"].values()
    assert max(losses) == pytest.approx(min(losses), rel=1e-4)
    assert all(len(seconds) == 2 for seconds in results["seconds_of"].values())
    assert len(results["seconds_of"]) == len(results["processor_of"]) == 5
    assert results["framework"]["wall"]["bare"] > 0


def test_a_loaded_machine_is_refused_before_anything_is_written(tmp_path):
    done = run_tool("--tiny", "--hardware=h", "--slug=s", "--max-load=-1", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "load average" in done.stderr
    assert not (tmp_path / "out").exists()
