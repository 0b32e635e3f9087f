"""The measurement of checkpoints runs from saves to record, so that it is there when somebody needs figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run_tool(*words):
    command = [sys.executable, "-m", "tools.bench_checkpoint", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)


def test_a_tiny_run_measures_and_writes_its_record(tmp_path):
    options = ("--tiny", "--force", "--hardware=a test", "--slug=test")
    done = run_tool(*options, f"--scratch={tmp_path}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    record = next((tmp_path / "out").glob("checkpoints_test_*.md")).read_text(encoding="utf-8")
    results = json.loads(next((tmp_path / "out").glob("checkpoints_test_*.json")).read_text(encoding="utf-8"))
    assert "its figures say nothing" in record
    assert set(results["figures"]) == {"1", "2"}
    for ranks, figures in results["figures"].items():
        assert 1.0 <= figures["bytes_share"] <= 1.01  # each fragment once, and headers; a count, not a timing
        assert min(figures[name] for name in ("synchronous", "held", "write", "beside", "load_mib_per_s")) > 0
        assert all(len(told["held"]) == 2 for told in results["ranks"][ranks])
        assert sum(told["bytes"] for told in results["ranks"][ranks]) == 12 * 2**20


def test_a_loaded_machine_is_refused_before_anything_is_written(tmp_path):
    done = run_tool("--tiny", "--hardware=h", "--slug=s", "--max-load=-1", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "load average" in done.stderr
    assert not (tmp_path / "out").exists()
