"""What a rank tells of itself while it works, one small file that is replaced again and again.

A rank that is stopped tells nothing more, so its last file is all there is: step, phase, where its main thread was and
which collective that was in. The position is read from the main thread's Python stack, so that not one collective has
to be wrapped; collectives that a GPU runs behind the host's back show in the groups' sequence numbers instead.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from janus_mega.observe.lenient import write_whole
from janus_mega.observe.pulse import Pulse
from janus_mega.parallel.groups import ProcessGroups

FOLDER = "heartbeat"
"""In the run directory: rank-RANK.json, and rank-RANK.stacks.txt once something hung."""

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_PIPELINE = "pipeline_parallel/p2p_communication.py"
_OURS = ("janus_mega/", "data_pipeline/", "tests/")


class Heartbeat:
    """Writes and reads the files of a job's ranks."""

    def __init__(self, run_dir: Path, pulse: Pulse, groups: ProcessGroups | None, main_thread: int) -> None:
        """`groups` is None while ranks still join; `main_thread` is the identity of the thread that trains."""
        self.folder = run_dir / FOLDER
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if groups is not None:
            self.rank, self.world_size = groups.layout.rank, groups.layout.world_size
        self._pulse = pulse
        self._main_thread = main_thread
        self._axes = {"world": dist.group.WORLD} | {axis: getattr(groups, axis, None) for axis in ("dp", "tp", "pp")}
        self._count = 0
        self._host = socket.gethostname()

    def path(self, rank: int, suffix: str) -> Path:
        """A file of a rank."""
        return self.folder / f"rank-{rank:05d}.{suffix}"

    def beat(self, limit_s: float = 0.0) -> None:
        """Tells where this rank is now; `limit_s` is how long it may go without progress there."""
        self._count += 1
        pulse = self._pulse
        told = {
            "rank": self.rank,
            "host": self._host,
            "pid": os.getpid(),
            "beat": self._count,
            "time": time.time(),
            "step": pulse.step,
            "phase": pulse.phase,
            "micro_batch": pulse.micro_batch,
            "without_progress_s": round(time.monotonic() - pulse.progress_at, 3),
            "limit_s": round(limit_s, 3),
            **_position(sys._current_frames().get(self._main_thread), self._axes),
            "collectives": {name: _sequence_number(group) for name, group in self._axes.items()},
        }
        write_whole(self.path(self.rank, "json"), json.dumps(told))

    def read_all(self) -> dict[int, dict[str, Any]]:
        """What all ranks told last; those of which nothing can be read are left out."""
        found = {}
        for rank in range(self.world_size):
            try:
                found[rank] = json.loads(self.path(rank, "json").read_bytes())
            except (OSError, ValueError):
                continue
        return found


def _position(frame: FrameType | None, axes: Mapping[str, Any]) -> dict[str, str]:
    """`waits_in`: the collective that a thread is in, or empty; `at`: the innermost line of ours it came through."""
    waits_in = at = ""
    while frame is not None and not (waits_in and at):
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if not waits_in and path.endswith(_COLLECTIVES):
            waits_in = f"{function} over {_axis_of(frame, axes)}"
        elif not waits_in and path.endswith(_PIPELINE):
            waits_in = f"{function} over pp"
        start = max(path.rfind(name) for name in _OURS)
        if not at and start >= 0 and "site-packages" not in path:
            at = f"{path[start:]}:{frame.f_lineno} {function}"
        frame = frame.f_back
    return {"waits_in": waits_in, "at": at}


def _axis_of(frame: FrameType, axes: Mapping[str, Any]) -> str:
    group = frame.f_locals.get("group")
    return next((name for name, known in axes.items() if group is known), "another group" if group else "world")


def _sequence_number(group: Any) -> int:
    """Collectives that this rank has begun in a group; -1 where a backend does not count, or no group is there yet."""
    if group is None:
        return -1
    try:
        return int(group._get_sequence_number_for_group())
    except RuntimeError:
        return -1
