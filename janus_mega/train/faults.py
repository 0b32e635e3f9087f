"""Faults on purpose, to see on one's own machines what a run does about them.

    JANUS_MEGA_FAULTS="rank=1,step=7,kind=sigkill; rank=last,kind=disk_full,phase=save,step=10"

A fault strikes once per run directory: before it does, it is written to `faults.jsonl` there and made durable, so what
was asked for is seen to have happened and the next start goes on without it. Without the variable nothing of this
module is called. What each kind must lead to is in docs/reliability.md.
"""

import ctypes
import errno
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from data_pipeline.errors import UserError
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.engine.digests import flip_bit
from janus_mega.observe.json_lines import read_lines

_log = logging.getLogger(__name__)

VARIABLE = "JANUS_MEGA_FAULTS"
FAULTS_FILE = "faults.jsonl"
"""In the run directory: {"fault", "rank", "step", "phase", "time"} for each that has struck."""
PHASES = ("init", "load", "step", "eval", "save")
STEPLESS = ("init", "load")
"""Phases that come once a start, whatever the step."""
KINDS_OF_PHASE = {"nan": "step", "flip": "step", "disk_full": "save", "disk_error": "save", "disk_slow": "save"}
"""Kinds that make sense in one phase alone."""
DEFAULT_S = 5.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    text: str
    """As it was asked for."""
    kind: str
    rank: int
    step: int = 1
    """Step, counted from 1, in which it happens; the one whose checkpoint is written or whose weights are validated."""
    phase: str = "step"
    seconds: float = DEFAULT_S
    """How long it lasts, where it does."""


class Faults:
    """Those of one rank that have not struck yet."""

    def __init__(self, faults: list[Fault], run_dir: Path) -> None:
        self._waiting = faults
        self._run_dir = run_dir

    def strike(self, phase: str, step: int = 0, engine: Any = None) -> None:
        """Does what is planned for a phase; may not return.

        Args:
            phase: one of PHASES.
            step: counted from 1; left out in init and load.
            engine: has `chunks`, for faults in numbers.
        """
        for fault in self._due(phase, step):
            if fault.kind != "flip":
                self._note(fault, step)
                _KINDS[fault.kind](fault, engine)

    def strike_weights(self, step: int, engine: Any) -> None:
        """Flips the bits that are to be flipped once the update of a step is made."""
        for fault in self._due("step", step):
            if fault.kind == "flip":
                self._note(fault, step)
                _flip(engine)

    def disk(self) -> Disk:
        """The disk on which the faults of saving happen."""
        return _FaultyDisk(self) if any(fault.phase == "save" for fault in self._waiting) else DISK

    def _due(self, phase: str, step: int) -> list[Fault]:
        return [fault for fault in self._waiting if fault.phase == phase and (phase in STEPLESS or fault.step == step)]

    def _note(self, fault: Fault, step: int) -> None:
        self._waiting.remove(fault)
        entry = {"fault": fault.text, "rank": fault.rank, "step": step, "phase": fault.phase, "time": time.time()}
        _log.warning("injected fault: %s on rank %d in %s, step %d", fault.kind, fault.rank, fault.phase, step)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        with (self._run_dir / FAULTS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def read_faults(run_dir: Path, rank: int, world_size: int) -> Faults | None:
    """The faults that the environment asks for on a rank; None if it asks for none anywhere.

    Raises:
        UserError: what it asks for cannot be.
    """
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return None
    path = run_dir / FAULTS_FILE
    struck = [entry["fault"] for entry in read_lines(path)] if path.exists() else []
    faults = [parse_fault(text, world_size) for text in map(str.strip, asked.split(";")) if text]
    return Faults([fault for fault in faults if fault.rank == rank and fault.text not in struck], run_dir)


def parse_fault(text: str, world_size: int) -> Fault:
    """One fault from `rank=1,step=7,kind=sigkill,phase=step,seconds=5`; rank and kind are needed, rank may be last."""
    try:
        words = dict(word.strip().split("=", 1) for word in text.split(","))
        rank = world_size - 1 if words.get("rank") == "last" else int(words["rank"])
        fault = Fault(
            text,
            words.pop("kind"),
            rank,
            int(words.get("step", 1)),
            words.get("phase", "step"),
            float(words.get("seconds", DEFAULT_S)),
        )
        unknown = sorted(set(words) - {"rank", "step", "phase", "seconds"})
    except (ValueError, KeyError):
        raise UserError(
            f"{VARIABLE}: {text!r} is no fault; write one as rank=1,step=7,kind=sigkill,phase=step"
        ) from None
    if unknown:
        raise UserError(f"{VARIABLE}: {text!r}: {unknown[0]} is unknown; leave it out")
    if fault.kind not in (*_KINDS, *_DISK_KINDS):
        raise UserError(f"{VARIABLE}: {text!r}: kind must be one of {', '.join((*_KINDS, *_DISK_KINDS))}")
    if fault.phase not in PHASES or KINDS_OF_PHASE.get(fault.kind, fault.phase) != fault.phase:
        raise UserError(f"{VARIABLE}: {text!r}: phase must be {KINDS_OF_PHASE.get(fault.kind, ', '.join(PHASES))}")
    if not 0 <= fault.rank < world_size:
        raise UserError(f"{VARIABLE}: {text!r}: rank must be below {world_size}")
    return fault


class _FaultyDisk(Disk):
    """The faults of saving strike when the first file of the checkpoint of their step is made."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._bad: dict[str, Fault] = {}

    def create(self, path: Path) -> BinaryIO:
        """As the disk does, after what strikes."""
        step = next((int(part[5:13]) for part in path.parts[::-1] if part.startswith("step-")), 0)
        for fault in self._faults._due("save", step):
            if fault.kind in _DISK_KINDS:
                self._faults._note(fault, step)
                self._bad[fault.kind] = fault
        self._faults.strike("save", step)
        return super().create(path)

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        """Slow, or no more room."""
        if slow := self._bad.pop("disk_slow", None):
            time.sleep(slow.seconds)
        if self._bad.pop("disk_full", None):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        super().write(file, content)

    def sync_file(self, file: BinaryIO) -> None:
        """What was written does not reach the disk."""
        if self._bad.pop("disk_error", None):
            raise OSError(errno.EIO, os.strerror(errno.EIO), file.name)
        super().sync_file(file)


def _send(number: int) -> Callable[[Fault, Any], None]:
    return lambda fault, engine: os.kill(os.getpid(), number)


def _read_nowhere(fault: Fault, engine: Any) -> None:
    ctypes.string_at(0)


def _raise(fault: Fault, engine: Any) -> None:
    raise RuntimeError(f"injected fault on rank {fault.rank}")


def _hold_interpreter(fault: Fault, engine: Any) -> None:
    """No other thread of the process runs Python any more: a library that forgets to release the interpreter."""
    ctypes.PyDLL(None).sleep(int(max(1.0, fault.seconds)))


def _make_nan(fault: Fault, engine: Any) -> None:
    """What this rank's first forward pass gives is no number."""
    chunk = engine.chunks[0]

    def poison(module: Any, inputs: Any, outputs: Any) -> Any:
        handle.remove()
        return tree_map(lambda x: x * float("nan") if torch.is_tensor(x) and x.is_floating_point() else x, outputs)

    handle = chunk.register_forward_hook(poison)


def _flip(engine: Any) -> None:
    """The lowest bit of the first weight that this rank holds."""
    parameter = next(parameter for chunk in engine.chunks for parameter in chunk.parameters() if parameter.numel())
    flip_bit(parameter, 0, 0)


def _lose_store(fault: Fault, engine: Any) -> None:
    """The place where ranks meet is gone for this rank: the file removed, connections to the host of it cut."""
    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.FileStore):
        Path(store.path).unlink(missing_ok=True)
    port = int(os.environ.get("MASTER_PORT", "0"))
    for descriptor in map(int, os.listdir("/proc/self/fd")) if port else ():
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        with connection:
            try:
                if port in (connection.getpeername()[1], connection.getsockname()[1]):
                    connection.shutdown(socket.SHUT_RDWR)
            except (OSError, IndexError, TypeError):
                continue


_KINDS: dict[str, Callable[[Fault, Any], None]] = {
    "sigkill": _send(signal.SIGKILL),
    "sigterm": _send(signal.SIGTERM),
    "sigstop": _send(signal.SIGSTOP),
    "segfault": _read_nowhere,
    "abort": lambda fault, engine: os.abort(),
    "exception": _raise,
    "gil": _hold_interpreter,
    "nan": _make_nan,
    "flip": lambda fault, engine: _flip(engine),
    "slow": lambda fault, engine: time.sleep(fault.seconds),
    "store": _lose_store,
}
_DISK_KINDS = ("disk_full", "disk_error", "disk_slow")
