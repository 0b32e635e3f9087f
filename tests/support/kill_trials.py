"""Real processes that save real checkpoints and are killed while they do.

One trial forks the ranks (torch is imported once, by the test), lets them claim, save, prune and tell through a pipe
what they were told is saved, and kills one of them: in front of some operation on the disk, in the middle of a write,
or from outside at some instant. The others are killed a moment later, as launchers do. Then the folder is looked at.
"""

import os
import random
import signal
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from janus_mega.checkpoint.claim import Claim, claim
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.finding import PUBLISHED_FILE, note_published
from janus_mega.checkpoint.format import find_damage
from janus_mega.checkpoint.hf.export import export_hf
from janus_mega.checkpoint.manager import Ranks, find_latest, list_checkpoints, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.reshard import reshard
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.checkpoint.staging import Staging
from janus_mega.train.writer import TellingDisk, Writer
from tests.support.crash_conversions import RESHARDED_STEP, TARGET
from tests.support.crash_disk import HookedDisk
from tests.support.crash_rules import Content, content_of
from tests.support.crash_traces import EXTRA_FILES, difference, slices_of, state_at, tensors_at

STEPS = (2, 4, 6, 8)
EXPORTED = ("float32", "bfloat16")
KEEP_LAST = 2
PATIENCE_S = 120.0
_TOLD = struct.Struct("<bq")
"""A rank, and a step that was acknowledged to it; or below 0 how many operations on the disk it made."""


@dataclass(frozen=True, slots=True)
class Kill:
    """When a rank dies."""

    rank: int = 0
    at_operation: int | None = None
    """Before which operation on its disk; in the middle of it where it is a write."""
    after_s: float = 0.0
    """Otherwise: how long after it began."""
    grace_s: float = 0.0
    """How much longer the other ranks live."""


@dataclass(frozen=True, slots=True)
class Life:
    """What a rank of a trial is given."""

    folder: Path
    rank: int
    world_size: int
    disk: Disk
    tell: Callable[[int], None]
    """Says that a step was acknowledged."""

    @property
    def root(self) -> Path:
        """Directory of checkpoints."""
        return self.folder / "run" / "checkpoints"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trial ended."""

    was_killed: bool
    acknowledged: Sequence[int]
    num_operations: dict[int, int]
    """On its disk, by rank, of ranks that came to their end."""
    seconds: float


class DeadlyDisk(HookedDisk):
    """Ends its own process before an operation; a write gets half of its bytes done first."""

    def __init__(self, at: int | None) -> None:
        super().__init__(self._count)
        self.count = 0
        self._at = at
        self._lock = threading.Lock()

    def _count(self, kind: str, path: Path) -> None:
        with self._lock:
            number = self.count
            self.count += 1
        if number == self._at and kind != "write":
            _die()

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        is_last = self.count == self._at
        super().write(file, memoryview(content)[: len(content) // 2] if is_last else content)
        if is_last:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal falls on the process, perhaps not on this very instruction


def live(
    work: Callable[[Life], None], folder: Path, world_size: int, kill: Kill | None, patience_s: float = PATIENCE_S
) -> Ended:
    """Runs `work` on forked ranks, kills as told, and returns when all are gone.

    Raises AssertionError if a rank failed by itself, or did not come to its end: a hang is not a kill.
    """
    reader, writer = os.pipe()
    start, children = time.monotonic(), []
    for rank in range(world_size):
        is_victim = kill is not None and kill.rank == rank
        disk = DeadlyDisk(kill.at_operation if is_victim and kill else None)
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            tell = partial(_tell, writer, rank)
            _be(work, Life(folder, rank, world_size, disk, tell), tell, disk)
        children.append(pid)
    os.close(writer)
    victim = children[kill.rank if kill else 0]
    if kill is not None and kill.at_operation is None:
        time.sleep(kill.after_s)
        os.kill(victim, signal.SIGKILL)  # not waited for yet, so the number is still its
    hung = threading.Event()
    killer = threading.Timer(patience_s, lambda: (hung.set(), _kill(children)))
    killer.start()
    was_killed = _wait(victim)
    if was_killed:
        time.sleep(kill.grace_s if kill else 0.0)
        _kill(children)
    for pid in children:
        _wait(pid)
    killer.cancel()
    killer.join()
    statuses = [os.waitpid(pid, 0)[1] for pid in children]  # not before, so the numbers were still theirs
    with open(reader, "rb") as pipe:
        told = [_TOLD.unpack(record) for record in iter(lambda: pipe.read(_TOLD.size), b"")]
    if hung.is_set():
        raise AssertionError(f"hung: not at its end after {patience_s:.1f} s, killed: {kill}, told: {told}")
    if not was_killed and any(statuses):
        raise AssertionError("a rank ended by itself: " + "".join(path.read_text() for path in folder.glob("said-*")))
    counts = {rank: -value for rank, value in told if value < 0}
    steps = [value for _, value in told if value >= 0]
    return Ended(was_killed, steps, counts, time.monotonic() - start)


def _wait(child: int) -> bool:
    """Whether SIGKILL ended it; it can still be sent signals, which do nothing."""
    end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert end is not None
    return end.si_code == os.CLD_KILLED and end.si_status == signal.SIGKILL


def _kill(children: Sequence[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _tell(descriptor: int, rank: int, value: int) -> None:
    os.write(descriptor, _TOLD.pack(rank, value))


def _be(work: Callable[[Life], None], life: Life, tell: Callable[[int], None], disk: DeadlyDisk) -> None:
    """A forked rank: never returns. What it says goes to a file, since most of it is about peers that are gone."""
    code = 1
    try:
        with (life.folder / f"said-{life.rank}").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                _join(life)
                work(life)
                tell(-disk.count)
                code = 0
            except BaseException:
                traceback.print_exc(file=said)
    finally:
        os._exit(code)


def _join(life: Life) -> None:
    if life.world_size > 1:
        store = dist.FileStore(str(life.folder / "store"), life.world_size)
        patience = timedelta(seconds=PATIENCE_S / 2)
        dist.init_process_group("gloo", store=store, rank=life.rank, world_size=life.world_size, timeout=patience)


def _agree(ok: bool) -> bool:
    worst = torch.tensor(int(ok))
    dist.all_reduce(worst, op=dist.ReduceOp.MIN)
    return bool(worst)


def _begin(life: Life) -> tuple[Claim, Ranks]:
    """The claim, made by rank 0, and who saves."""
    key = torch.tensor(claim(life.root, disk=life.disk).key if life.rank == 0 else 0)
    if life.world_size == 1:
        return Claim.from_key(life.root, int(key)), Ranks()
    dist.broadcast(key, 0)
    return Claim.from_key(life.root, int(key)), Ranks(life.rank, life.world_size, _agree)


def save_and_prune(life: Life) -> None:
    """Saves some steps, each waited for, with retention."""
    mine, ranks = _begin(life)
    for step in STEPS:
        path = save_checkpoint(
            mine,
            slices_of(tensors_at(step), life.rank, life.world_size),
            state_at(step, life.rank),
            ranks=ranks,
            extra_files=EXTRA_FILES,
            disk=life.disk,
        )
        life.tell(step)
        if life.rank == 0:
            note_published(life.root, life.disk)
            apply_retention(mine, KEEP_LAST, written=path, disk=life.disk)


def save_beside(life: Life) -> None:
    """Saves some steps in a thread, from snapshots, while the live tensors change."""
    mine, ranks = _begin(life)
    group = dist.new_group() if life.world_size > 1 else None
    writer, staging, tensors = Writer(group), Staging(), tensors_at(0)
    ranks = replace(ranks, agree=writer.agree)
    disk = TellingDisk(life.disk, writer.note_progress)

    def hear() -> None:
        outcome = writer.take(wait=True)
        if outcome is not None:
            if outcome.path is None:
                raise outcome.error or OSError("not saved")
            life.tell(outcome.step)

    for step in STEPS:
        hear()
        for name, tensor in tensors_at(step).items():
            tensors[name].copy_(tensor)
        snapshot = staging.snapshot(slices_of(tensors, life.rank, life.world_size))

        def job(step: int = step, snapshot: object = snapshot) -> Path:
            path = save_checkpoint(
                mine, snapshot, state_at(step, life.rank), ranks=ranks, extra_files=EXTRA_FILES, disk=disk
            )
            if life.rank == 0:
                note_published(life.root, disk)
                apply_retention(mine, KEEP_LAST, written=path, disk=disk)
            return path

        writer.begin(step, job)
        for tensor in tensors.values():
            tensor.add_(1)
    hear()


def reshard_once(source: Path, life: Life) -> None:
    """Writes a checkpoint again, for three ranks."""
    reshard(open_checkpoint(source), life.root, TARGET, disk=life.disk)
    life.tell(RESHARDED_STEP)


def what_is_lost_of_reshard(source: Path, folder: Path, ended: Ended) -> str | None:
    """As of a save, and the same command does what was not done."""
    root = folder / "run" / "checkpoints"
    if find_latest(root) is None and not ended.acknowledged:
        path = reshard(open_checkpoint(source), root, TARGET)
        if wrong := difference(path, RESHARDED_STEP):
            return wrong
        left = sorted(entry.name for entry in root.iterdir() if entry != path)
        if left:
            return f"rubbish stays: {left}"
    return what_is_lost(folder, ended)


def export_twice(checkpoint: Path, life: Life) -> None:
    """Writes a Hugging Face directory, then another in its place."""
    for number, dtype in enumerate(EXPORTED):
        export_hf(checkpoint, life.folder / "hf", dtype=dtype, overwrite=number > 0, disk=life.disk)
        life.tell(number)


def what_is_lost_of_export(checkpoint: Path, wholes: Sequence[Content], folder: Path, ended: Ended) -> str | None:
    """The same of `export_twice`; `wholes` are the two directories. While it is replaced, there may be none."""
    out_dir, newest = folder / "hf", max(ended.acknowledged, default=-1)
    content = content_of(out_dir) if out_dir.exists() else None
    if content is not None and content not in wholes[max(newest, 0) :]:
        return f"after {newest}: neither of the directories"
    if content is None and newest == len(wholes) - 1:
        return "it had been written, and is gone"
    export_hf(checkpoint, out_dir, dtype=EXPORTED[0], overwrite=True)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return f"rubbish stays: {left}" if left or content_of(out_dir) != wholes[0] else None


def what_is_lost(folder: Path, ended: Ended) -> str | None:
    """One line about what a trial lost or left half-done under a step name, or None; then the next attempt goes on."""
    root = folder / "run" / "checkpoints"
    newest = max(ended.acknowledged, default=None)
    for entry in list_checkpoints(root):
        if damage := find_damage(entry.path):
            return f"half of a checkpoint has a name: {damage}"
    found = find_latest(root)
    if newest is not None and (found is None or _step(found) < newest):
        return f"step {newest} was acknowledged, {found} is found"
    if found is not None and (wrong := difference(found, _step(found))):
        return wrong
    return _cannot_go_on(root)


def _cannot_go_on(root: Path) -> str | None:
    mine = claim(root)
    path = save_checkpoint(mine, slices_of(tensors_at(90), 0, 1), state_at(90), extra_files=EXTRA_FILES)
    apply_retention(mine, KEEP_LAST, written=path)
    if find_latest(root) != path or difference(path, 90):
        return f"the next attempt cannot go on: {find_latest(root)}"
    known = (mine.directory.name, PUBLISHED_FILE)
    left = [entry.name for entry in root.iterdir() if entry.name.startswith(".") and entry.name not in known]
    return f"rubbish stays: {left}" if left else None


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def kills(chance: random.Random, whole: Ended, world_size: int) -> Iterator[Kill]:
    """Without end: in front of every operation of a life in a mixed order, and as many at any instant of it."""
    while True:
        places = [(rank, at) for rank, count in whole.num_operations.items() for at in range(count)]
        chance.shuffle(places)
        for rank, at in places:
            grace_s = chance.uniform(0, 0.02) if world_size > 1 else 0.0
            yield Kill(rank, at_operation=at, grace_s=grace_s)
            yield Kill(chance.randrange(world_size), after_s=chance.uniform(0, whole.seconds), grace_s=grace_s)
