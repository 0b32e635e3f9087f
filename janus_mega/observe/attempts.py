"""What a run was started with, attempt after attempt: `<run_dir>/attempts/0001/`.

    command.json    argv, ranks, chosen variables of the environment, git commit, when and how it began and ended
    versions.json   Python and the libraries that decide numbers
    spans.jsonl     {"name": "build", "start_s": epoch seconds, "seconds": 3.2}, a line as each ends
    diff.patch      what the checkout had over its commit; absent where nothing was changed

A process that is killed leaves `ended_s` null. Of the environment only what is named here is kept, since variables hold
secrets. Nothing here reaches the arithmetic: it is files, written by rank 0.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from janus_mega.observe.lenient import Lenient, LenientLines, write_whole

ATTEMPTS_DIR = "attempts"
COMMAND_FILE, VERSIONS_FILE, SPANS_FILE, DIFF_FILE = "command.json", "versions.json", "spans.jsonl", "diff.patch"

LIBRARIES = ("torch", "megatron-core", "deepspeed", "transformers", "numpy", "sentencepiece", "webdataset", "omegaconf")
KEPT_VARIABLES = ("WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS")
KEPT_PREFIXES = ("NCCL_", "TORCH_NCCL_", "PYTORCH_", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS")
MAX_DIFF_BYTES = 1 << 20
_GIT_TIMEOUT_S = 20.0


class Attempt:
    """One start of a run."""

    def __init__(self, directory: Path | None, facts: Mapping[str, Any] | None = None) -> None:
        """`directory` is None on ranks that write nothing; `facts` are those of the command."""
        self._directory = directory
        self._facts = dict(facts or {})
        self._spans = None if directory is None else LenientLines(directory / SPANS_FILE)

    @property
    def number(self) -> int | None:
        """Counted from 1 in each run directory; None on ranks that write nothing."""
        return None if self._directory is None else int(self._directory.name)

    @property
    def commit(self) -> str | None:
        """Git commit of the checkout, where there is one."""
        return self._facts.get("commit")

    def finish(self, outcome: str) -> None:
        """Records when and how it ended; a disk that takes no record leaves the end, and its exit code, as it is."""
        if self._directory is not None:
            path = self._directory / COMMAND_FILE
            ended = {"ended_s": round(time.time(), 3), "outcome": outcome}
            Lenient(str(path)).attempt(lambda: _write(path, self._facts | ended))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times a part of the attempt; also one that fails."""
        began, clock = time.time(), time.perf_counter()
        try:
            yield
        finally:
            if self._spans is not None:
                line = {"name": name, "start_s": round(began, 3), "seconds": round(time.perf_counter() - clock, 3)}
                self._spans.append([line])


@contextmanager
def recorded_attempt(run_dir: Path, *, enabled: bool) -> Iterator[Attempt]:
    """Records a start of a run, and at the end how it ended; `enabled` on the one rank that writes."""
    if not enabled:
        yield Attempt(None)
        return
    directory = _next_directory(run_dir / ATTEMPTS_DIR)
    facts = _facts()
    diff = facts.pop("diff")
    if diff:
        (directory / DIFF_FILE).write_bytes(diff[:MAX_DIFF_BYTES])
    _write(directory / VERSIONS_FILE, _versions())
    _write(directory / COMMAND_FILE, facts)
    outcome, attempt = "finished", Attempt(directory, facts)
    try:
        with attempt.span("attempt"):
            yield attempt
    except BaseException as error:
        outcome = type(error).__name__
        if hasattr(error, "exit_code"):  # an end that was meant, whose message says what is saved and what to do
            outcome += f": {error}"
        raise
    finally:
        attempt.finish(outcome)


def _next_directory(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
        directory = root / f"{max(numbers, default=0) + 1:04d}"
        try:
            directory.mkdir()
        except FileExistsError:  # somebody else has just started too
            continue
        return directory


def _facts() -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD")
    return {
        "argv": sys.argv,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)
        },
        "commit": commit.decode().strip() or None,
        "diff": _git("diff", "HEAD") if commit else b"",
        "started_s": round(time.time(), 3),
        "ended_s": None,
        "outcome": None,
    }


def _git(*arguments: str) -> bytes:
    """Output of git in the checkout that this code runs from; empty where it is installed, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return b""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=_GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def _write(path: Path, values: Any) -> None:
    write_whole(path, json.dumps(values, indent=1) + "\n")
