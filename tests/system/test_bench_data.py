"""The comparison tool runs from raw data to record, so that it is there when somebody needs figures.

Without peers (they live in environments that the tool downloads); webdataset takes part, it is a dependency.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run_tool(*words):
    command = [sys.executable, "-m", "tools.bench_data", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_tiny_run_measures_everything_and_writes_its_record(tmp_path):
    pytest.importorskip("sklearn")
    options = ("--tiny", "--peers=none", "--force", "--core=-1", "--hardware=a test", "--slug=test")
    done = run_tool(*options, f"--scratch={tmp_path}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    record = next((tmp_path / "out").glob("data_test_*.md")).read_text(encoding="utf-8")
    results = json.loads(next((tmp_path / "out").glob("data_test_*.json")).read_text(encoding="utf-8"))
    assert "its figures say nothing" in record
    assert not results["failures"]
    assert {"our tars in sequence, webdataset", "webdataset, one sample a key"} < results["tokens"].keys()
    assert results["sums"][0] == 400
    assert results["resume"]["janus_mega"]["exact"] is True
    assert results["resume"]["webdataset"] == {"not_offered": "no state"}
    for title, answers in results["tokens"].items():
        assert all(answer["cpu_s"] > 0 and answer["ids"] > 100_000 for answer in answers), title
    for photos in ("photos512", "photos1024"):
        assert all(answer["samples"] == 4 for answers in results[photos].values() for answer in answers)
        assert set(results["limits"]["pictures/s"]) == {"photos512", "photos1024"}


def test_a_loaded_machine_is_refused_before_anything_is_written(tmp_path):
    done = run_tool("--tiny", "--hardware=h", "--slug=s", "--max-load=-1", f"--scratch={tmp_path / 'scratch'}")
    assert done.returncode == 1
    assert "load average" in done.stderr
    assert not (tmp_path / "scratch").exists()


def test_an_unknown_peer_is_named():
    done = run_tool("--peers=nobody", "--hardware=h", "--slug=s")
    assert done.returncode == 2
    assert "'nobody' is none of webdataset, energon, litdata, mosaic" in done.stderr
