"""`.ci/run` says how long each part took, and fails when one fails or all of them take too long."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PARTS = ("setup", "check", "test", "faults", "demo")


def run_ci(folder: Path, repository: Path, failing: str = "none", limit: str = "1800") -> subprocess.CompletedProcess:
    """Runs a copy of the script among stand-ins for what it starts; the part `failing` fails."""
    (folder / ".ci").mkdir()
    script = (repository / ".ci" / "run").read_text()
    assert "max_seconds=1800\n" in script
    (folder / ".ci" / "run").write_text(script.replace("max_seconds=1800", f"max_seconds={limit}"))
    for name in ("bin/make", ".venv/bin/janus-mega"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(f'#!/bin/sh\ncase "$*" in *{failing}*) exit 1;; esac\n')
        (folder / name).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [shutil.which("bash") or "bash", ".ci/run"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


def test_all_parts_are_timed(tmp_path, repository):
    done = run_ci(tmp_path, repository)
    assert done.returncode == 0, done.stderr
    summary = done.stdout.split("== summary\n")[1].splitlines()
    assert [line.split()[:2] for line in summary[:-1]] == [[part, "ok"] for part in PARTS]
    assert all(line.endswith(" s") for line in summary)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fails_is_named(part, tmp_path, repository):
    done = run_ci(tmp_path, repository, failing=part)
    assert done.returncode == 1
    assert f"{part} FAILED" in " ".join(done.stdout.split())


def test_too_many_seconds_fail(tmp_path, repository):
    done = run_ci(tmp_path, repository, limit="-1")
    assert done.returncode == 1
    assert "above the -1 s" in done.stdout
