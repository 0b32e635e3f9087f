"""The thread beside training that writes checkpoints: one save at a time, its end agreed by all ranks.

Its collectives run over `groups.saving` and nothing else, so they never meet those of training. There is a thread per
save, not one that waits for work: between saves nothing runs, so nothing has to be told to end, and a process that
forks then (workers of a loader) takes no half-done work along. Threads are daemons: a process that must end ends, and
what it was writing has no name yet.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from janus_mega.checkpoint.claim import Superseded
from janus_mega.checkpoint.disk import Disk

_TICK_S = 0.5


class Verdict(IntEnum):
    """How a save ended; of several ranks the worst counts for all."""

    saved = 0
    failed = 1
    lost = 2
    """The agreement itself failed, so the ranks may know different things of this save and can agree on no other."""
    superseded = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a save; the verdict is the same on all ranks unless it is lost, the error is this rank's view."""

    step: int
    verdict: Verdict
    path: Path | None
    """None unless it was saved."""
    error: BaseException | None
    """None only if it was saved."""
    seconds: float
    """From begin to end, on this rank."""


class TellingDisk(Disk):
    """A disk that tells whenever an operation has ended, so that somebody who waits can tell slow from stuck."""

    def __init__(self, disk: Disk, tell: Callable[[], None]) -> None:
        self._disk = disk
        self._tell = tell

    def make_directory(self, path: Path) -> None:
        """As the disk does."""
        self._disk.make_directory(path)
        self._tell()

    def create(self, path: Path) -> BinaryIO:
        """As the disk does."""
        file = self._disk.create(path)
        self._tell()
        return file

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        """As the disk does."""
        self._disk.write(file, content)
        self._tell()

    def sync_file(self, file: BinaryIO) -> None:
        """As the disk does."""
        self._disk.sync_file(file)
        self._tell()

    def sync_directory(self, path: Path) -> None:
        """As the disk does."""
        self._disk.sync_directory(path)
        self._tell()

    def rename(self, source: Path, target: Path) -> None:
        """As the disk does."""
        self._disk.rename(source, target)
        self._tell()

    def remove_file(self, path: Path) -> None:
        """As the disk does."""
        self._disk.remove_file(path)
        self._tell()

    def remove_directory(self, path: Path) -> None:
        """As the disk does."""
        self._disk.remove_directory(path)
        self._tell()


class Writer:
    """Runs saves in the background of one rank."""

    def __init__(self, group: dist.ProcessGroup | None, tick: Callable[[], None] = lambda: None) -> None:
        """Nothing runs yet.

        Args:
            group: all ranks, over gloo, used by nobody else; None for a process without others.
            tick: called again and again by whoever waits, as long as this rank's writing moves. Where it waits for that
                of others, the watchdog sees theirs move; one that has stopped must not hide behind those that wait.
        """
        self._group = group
        self._tick = tick
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._moved = 0
        self._is_lost = False

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, job: Callable[[], Path]) -> None:
        """Starts a save; `job` may be collective, through `agree` alone. The one before must have been taken."""
        if self._thread is not None:
            raise RuntimeError("a save is under way; take its outcome first")
        self._outcome = None
        arguments = (step, job, time.perf_counter())
        self._thread = threading.Thread(target=self._run, args=arguments, name="janus-mega-writer", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> Outcome | None:
        """The outcome of the last save, once; None where there is none, or it is under way and not waited for."""
        if self._thread is None or not (wait or self._outcome):
            return None
        self.wait_until(self._is_over)
        outcome, self._thread = self._outcome, None
        return outcome

    def let_go(self, seconds: float) -> bool:
        """Whether nothing is under way after at most so many seconds; for a process that is to end."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.is_busy

    def wait_until(self, is_so: Callable[[float], bool]) -> None:
        """Waits, ticking, until `is_so`, which waits for at most the seconds it is given."""
        moved = -1
        while not is_so(_TICK_S):
            if moved != self._moved:
                moved = self._moved
                self._tick()

    def _is_over(self, seconds: float) -> bool:
        assert self._thread is not None
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def note_progress(self) -> None:
        """To be called by the job as it moves on."""
        self._moved += 1

    def agree(self, ok: bool) -> bool:
        """Whether every rank says yes. Collective over: saving."""
        return self._worst(int(not ok)) == 0

    def _worst(self, code: int) -> int:
        if self._group is None:
            return code
        if self._is_lost:  # a group that failed once is broken, and its ranks may be in different places
            raise ConnectionError("the ranks could not agree on an earlier save")
        worst = torch.tensor(code)
        try:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._group)
        except Exception:
            self._is_lost = True
            raise
        return int(worst)

    def _run(self, step: int, job: Callable[[], Path], start: float) -> None:
        path: Path | None = None
        error: BaseException | None = None
        verdict = Verdict.saved
        try:
            path = job()
        except BaseException as raised:  # whatever it was: training goes on, or ends at a border
            error = raised
            verdict = Verdict.superseded if isinstance(raised, Superseded) else Verdict.failed
        try:
            verdict = Verdict(self._worst(verdict))
        except Exception as raised:  # a rank is gone, or out of step
            error, verdict = error or raised, max(verdict, Verdict.lost)
        if verdict is not Verdict.saved and error is None:
            error = OSError("another rank failed, see its log")
        path = path if verdict is Verdict.saved else None
        self._outcome = Outcome(step, verdict, path, error, time.perf_counter() - start)
