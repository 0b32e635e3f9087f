"""Disks for tests of crashes: one that writes down what is done to it, one that dies, one that fails, one that is slow.

Each is a `Disk`, the seam that everything which writes a checkpoint goes through, and does the real thing in a real
folder besides. A recording holds the operations of all ranks with their bytes; `crash_states` turns it into what a
power loss may leave behind.
"""

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from janus_mega.checkpoint.disk import DISK, Disk

OPERATIONS = (
    "make_directory",
    "create",
    "write",
    "sync_file",
    "sync_directory",
    "rename",
    "remove_file",
    "remove_directory",
)
"""The primitive operations, as `Disk` names them; `remove_tree` is made of them."""
NOTE, MEET = "note", "meet"
"""What a recording holds besides operations: a remark of the test, and ranks that waited for each other."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a rank did to the disk, or a note."""

    kind: str
    rank: int
    path: str = ""
    """Relative to the recording's base."""
    target: str = ""
    """Where a rename goes."""
    file: int = -1
    """Number that `create` gave; what write and sync_file are about."""
    content: bytes = b""
    note: Any = None


@dataclass
class Recording:
    """Operations of all ranks under one folder, in the order in which they happened."""

    base: Path
    operations: list[Operation] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)
    num_files: int = 0

    def disk(self, rank: int = 0) -> "Recorder":
        """The disk of one rank."""
        return Recorder(self, rank)

    def note(self, remark: Any, rank: int = 0) -> None:
        """Writes a remark down between the operations."""
        with self.lock:
            self.operations.append(Operation(NOTE, rank, note=remark))

    def meet(self, rank: int) -> None:
        """Writes down that a rank waited here for all the others."""
        with self.lock:
            self.operations.append(Operation(MEET, rank))

    def other_order(self, chance: random.Random) -> list[Operation]:
        """The same operations as ranks of other speed would have made them: each rank's order and all meetings stay."""
        ranks = sorted({operation.rank for operation in self.operations})
        queues = {rank: [op for op in self.operations if op.rank == rank] for rank in ranks}
        merged: list[Operation] = []
        waiting: set[int] = set()
        while any(queues.values()):
            ready = [rank for rank in ranks if queues[rank] and rank not in waiting]
            if not ready:
                raise ValueError("the ranks of the recording met a different number of times")
            rank = chance.choice(ready)
            operation = queues[rank].pop(0)
            if operation.kind == MEET:
                waiting.add(rank)
                if waiting >= set(ranks):
                    waiting.clear()
            else:
                merged.append(operation)
        return merged


class Recorder(Disk):
    """Does everything on the real disk and writes it down."""

    def __init__(self, recording: Recording, rank: int) -> None:
        self._recording = recording
        self._rank = rank
        self._numbers: dict[BinaryIO, int] = {}

    def _keep(self, kind: str, **fields: Any) -> None:
        for name in ("path", "target"):
            if name in fields:
                fields[name] = Path(fields[name]).relative_to(self._recording.base).as_posix()
        self._recording.operations.append(Operation(kind, self._rank, **fields))

    def make_directory(self, path: Path) -> None:
        with self._recording.lock:
            super().make_directory(path)
            self._keep("make_directory", path=path)

    def create(self, path: Path) -> BinaryIO:
        with self._recording.lock:
            file = super().create(path)
            self._recording.num_files += 1
            self._numbers[file] = self._recording.num_files
            self._keep("create", path=path, file=self._recording.num_files)
            return file

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        with self._recording.lock:
            super().write(file, content)
            self._keep("write", file=self._numbers[file], content=bytes(content))

    def sync_file(self, file: BinaryIO) -> None:
        with self._recording.lock:
            self._keep("sync_file", file=self._numbers[file])

    def sync_directory(self, path: Path) -> None:
        with self._recording.lock:
            os.stat(path)
            if self._recording.base == path or self._recording.base in path.parents:  # not what lies above
                self._keep("sync_directory", path=path)

    def rename(self, source: Path, target: Path) -> None:
        with self._recording.lock:
            super().rename(source, target)
            self._keep("rename", path=source, target=target)

    def remove_file(self, path: Path) -> None:
        with self._recording.lock:
            super().remove_file(path)
            self._keep("remove_file", path=path)

    def remove_directory(self, path: Path) -> None:
        with self._recording.lock:
            super().remove_directory(path)
            self._keep("remove_directory", path=path)


class Through(Disk):
    """Hands everything on to another disk; what is wrong with a disk is written as a subclass."""

    def __init__(self, inner: Disk = DISK) -> None:
        self.inner = inner

    def make_directory(self, path: Path) -> None:
        self.inner.make_directory(path)

    def create(self, path: Path) -> BinaryIO:
        return self.inner.create(path)

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        self.inner.write(file, content)

    def sync_file(self, file: BinaryIO) -> None:
        self.inner.sync_file(file)

    def sync_directory(self, path: Path) -> None:
        self.inner.sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self.inner.rename(source, target)

    def remove_file(self, path: Path) -> None:
        self.inner.remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self.inner.remove_directory(path)


class HookedDisk(Through):
    """Calls `before(kind, path)` ahead of every operation; what it raises is the operation's failure."""

    def __init__(self, before: Callable[[str, Path], None], inner: Disk = DISK) -> None:
        super().__init__(inner)
        self._before = before

    def make_directory(self, path: Path) -> None:
        self._before("make_directory", path)
        super().make_directory(path)

    def create(self, path: Path) -> BinaryIO:
        self._before("create", path)
        return super().create(path)

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        self._before("write", Path(file.name))
        super().write(file, content)

    def sync_file(self, file: BinaryIO) -> None:
        self._before("sync_file", Path(file.name))
        super().sync_file(file)

    def sync_directory(self, path: Path) -> None:
        self._before("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", target)
        super().rename(source, target)

    def remove_file(self, path: Path) -> None:
        self._before("remove_file", path)
        super().remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self._before("remove_directory", path)
        super().remove_directory(path)


class Counter:
    """A hook that counts operations, each once, and acts on those that a test asks for."""

    def __init__(self, act: Callable[[int, str], None]) -> None:
        self.count = 0
        self._act = act
        self._lock = threading.Lock()

    def __call__(self, kind: str, path: Path) -> None:
        with self._lock:
            number = self.count
            self.count += 1
        self._act(number, kind)


def killing_disk(at: int) -> HookedDisk:
    """Ends its own process by SIGKILL before operation `at` (from 0)."""

    def act(number: int, kind: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the signal falls on the whole process, but perhaps not on this very instruction

    return HookedDisk(Counter(act))


class PowerCut(BaseException):
    """Ends whoever uses a disk, past all handlers of errors."""


def dying_disk(at: Callable[[int, str, Path], bool], inner: Disk) -> HookedDisk:
    """Raises PowerCut instead of the first operation that `at(number, kind, path)` names and of all later ones."""
    is_dead = False
    numbers = count()

    def before(kind: str, path: Path) -> None:
        nonlocal is_dead
        is_dead = is_dead or at(next(numbers), kind, path)
        if is_dead:
            raise PowerCut

    return HookedDisk(before, inner)


def failing_disk(code: int, at: Callable[[int, str], bool]) -> HookedDisk:
    """Fails with an errno where `at(number, kind)` says so."""

    def act(number: int, kind: str) -> None:
        if at(number, kind):
            raise OSError(code, os.strerror(code))

    return HookedDisk(Counter(act))


def full_disk(after: int) -> HookedDisk:
    """Fails from operation `after` on with whatever takes space; removing and renaming still work."""
    taking = ("make_directory", "create", "write")
    return failing_disk(errno.ENOSPC, lambda number, kind: number >= after and kind in taking)


def slow_disk(seconds: float) -> HookedDisk:
    """Every operation takes longer."""
    return HookedDisk(lambda kind, path: time.sleep(seconds))


def num_operations(run: Callable[[Disk], Any]) -> int:
    """How many operations `run(disk)` makes."""
    counter = Counter(lambda number, kind: None)
    run(HookedDisk(counter))
    return counter.count
