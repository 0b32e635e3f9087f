"""The tool's end of a measured process: one request a line, one answer a line."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tools.bench_data.environments import ROOT, environment_variables


class WorkerFailed(Exception):
    """A measured process answered with an error, or ended."""


class Worker:
    """A process that holds one system and measures what it is asked to."""

    def __init__(self, system: str, python: Path, core: int, log: Path) -> None:
        """Starts the process; nothing is imported in this one."""
        self.system = system
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [python, "-m", "tools.bench_data.worker", system, str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=environment_variables(),
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Has an operation done and returns its value.

        Raises:
            WorkerFailed: It raised, or the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(f"{self.system}: the process ended ({self._process.wait()}); see {self._log.name}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.system}: {operation}: {answer['error']}; see {self._log.name}")
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
