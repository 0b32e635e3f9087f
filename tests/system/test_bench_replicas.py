"""The benchmark of comparisons runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.dist
def test_a_tiny_comparison_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench_replicas", "--hardware", "a test", "--slug", "test", "--tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--force", "--out", str(tmp_path), "--repeats", "2"],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("replicas_test_*.md")
    assert "**its figures say nothing.**" in path.read_text() and "16 large" not in path.read_text()
