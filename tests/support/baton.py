"""Several writers in one process, of which only the one that holds the baton runs: interleavings that a seed repeats.

Real threads, since the code under test is plain functions; but a writer stands still before every operation on the disk
until the scheduler, driven by a seed, hands it the baton. So two saves meet in any order that operations may have, and
a failure comes again with its seed.
"""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from janus_mega.checkpoint.disk import Disk


class Killed(BaseException):
    """A writer was ended where it stood, as by SIGKILL."""


class Baton:
    """Hands control to one writer at a time."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self._patience = self.chance.choice([0.0, 0.5, 0.9, 0.98])
        """How likely the writer that runs goes on: 0 mixes single operations, 0.98 lets others sleep for long."""
        self._turns: dict[str, threading.Semaphore] = {}
        self._threads: list[threading.Thread] = []
        self._returned = threading.Semaphore(0)
        self._ready: list[str] = []
        self._doomed: set[str] = set()
        self.doom_at: dict[int, list[str]] = {}
        """Turn -> writers that are killed when they are next picked."""
        self.errors: dict[str, BaseException] = {}
        """What writers ended with, other than by returning or being killed."""
        self.now = 0
        """Turns so far."""

    def add(self, name: str, work: Callable[[], None]) -> None:
        """Adds a writer; it starts when it is first picked."""
        self._turns[name] = threading.Semaphore(0)

        def run() -> None:
            self._turns[name].acquire()
            try:
                work()
            except Killed:
                pass
            except BaseException as error:
                self.errors[name] = error
            self._ready.remove(name)
            self._returned.release()

        self._ready.append(name)
        self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        self._threads[-1].start()

    def pause(self) -> None:
        """Called by the writer that runs: hands the baton back and returns when it is picked again."""
        name = threading.current_thread().name
        self._returned.release()
        self._turns[name].acquire()
        if name in self._doomed:
            raise Killed

    def is_dead(self, name: str) -> bool:
        """Whether a writer is killed, or about to be."""
        return name in self._doomed

    def run(self, most_turns: int = 100_000) -> None:
        """Until all writers have ended."""
        current = ""
        while self._ready:
            self.now += 1
            if self.now > most_turns:
                raise TimeoutError(f"{self._ready} were still running after {most_turns} turns")
            self._doomed.update(self.doom_at.pop(self.now, ()))
            if current not in self._ready or self.chance.random() >= self._patience:
                current = self.chance.choice(self._ready)
            self._turns[current].release()
            self._returned.acquire()
        for thread in self._threads:
            thread.join()


class TurnDisk(Disk):
    """Waits for its turn before every operation, and tells which renames were made."""

    def __init__(self, baton: Baton, root: Path, renamed: Callable[[Path, Path], None]) -> None:
        """`root` is what writers share; above it nothing is waited for, or seeds would depend on where it lies."""
        self._baton = baton
        self._root = root
        self._renamed = renamed

    def make_directory(self, path: Path) -> None:
        self._baton.pause()
        super().make_directory(path)

    def create(self, path: Path) -> BinaryIO:
        self._baton.pause()
        return super().create(path)

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        self._baton.pause()
        super().write(file, content)

    def sync_file(self, file: BinaryIO) -> None:
        """Power failures are another test's business."""
        self._baton.pause()

    def sync_directory(self, path: Path) -> None:
        """As a real one where the directory is gone."""
        if path.is_relative_to(self._root):
            self._baton.pause()
        if not path.is_dir():
            raise FileNotFoundError(path)

    def rename(self, source: Path, target: Path) -> None:
        self._baton.pause()
        super().rename(source, target)
        self._renamed(source, target)

    def remove_file(self, path: Path) -> None:
        self._baton.pause()
        super().remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self._baton.pause()
        super().remove_directory(path)
