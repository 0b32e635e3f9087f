"""State of a few tensors that a real `Saver` saves, and disks that are slow, shut or broken for it.

Values are a function of step and place, so a checkpoint tells by itself of which instant each element is.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from janus_mega.checkpoint.claim import Claim, claim
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.manager import open_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.config.schema import CheckpointConfig
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.parallel.slices import Slice
from janus_mega.train.saving import CHECKPOINTS_DIR, Saver
from janus_mega.train.starting import Start
from janus_mega.train.together import on_rank_0
from tests.support.tiny import fp32, tiny_recipe

SHAPES = {"table": (64, 40), "vector": (96,), "steps": (8,)}


class HeldState:
    """What a Saver asks of `restoring.LiveState`, over tensors of which each rank owns some rows."""

    def __init__(self, groups: ProcessGroups, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        self.groups = groups
        self.engine = self
        rank, world_size = groups.layout.rank, groups.layout.world_size
        self.owned: list[Slice] = []
        for name, shape in (shapes or SHAPES).items():
            rows = shape[0] // world_size
            dtype = torch.int64 if name == "steps" else torch.float32
            offset = (rank * rows, *(0 for _ in shape[1:]))
            self.owned.append(Slice(name, shape, offset, torch.zeros(rows, *shape[1:], dtype=dtype)))
        self.train(0)

    def train(self, step: int) -> None:
        """Changes every element in place, as an update does."""
        for piece in self.owned:
            piece.tensor.copy_(value_at(step, piece))
        self.record(step)

    def slices(self) -> list[Slice]:
        return list(self.owned)

    outlines = slices

    def weights(self) -> list[Slice]:
        return [piece for piece in self.owned if piece.name != "steps"]

    def at(self, step: int) -> TrainState:
        rng = {"drawn": torch.tensor([step, self.groups.layout.rank])}
        return TrainState(
            step=step, consumed_rows=8 * step, plan_digest="held", config_text="name: held\n",
            health=self.record(step), rng=rng,
        )  # fmt: skip

    def record(self, step: int) -> dict[str, Any]:
        """The same object each time, changed in place: whoever keeps it must have copied it."""
        self._record = getattr(self, "_record", {})
        self._record.update(updates=step, window=[step] * 3)
        return self._record

    def go_back(self, reader: Any, step: int) -> None:
        for piece in self.owned:
            piece.tensor.copy_(reader.read_box(piece.name, piece.box))


def value_at(step: int, piece: Slice) -> Tensor:
    """Values of a slice after a step."""
    return (torch.arange(piece.tensor.numel()).view(piece.tensor.shape) + 1000 * step).to(piece.tensor.dtype)


class HeldWorkload:
    """The rest of what a Saver asks for."""

    def extra_files(self) -> dict[str, bytes | Path]:
        return {"notes/extra.txt": b"extra"}


@contextmanager
def held_saver(
    run_dir: Path, disk: Disk | None = None, start: Start | None = None, shapes: Any = None, **checkpoint: Any
) -> Iterator[tuple[HeldState, Saver]]:
    """State and Saver of this rank, which has claimed the folder. Collective over: world."""
    groups = groups_of_process()
    recipe = replace(tiny_recipe(run_dir, fp32(), 4), checkpoint=CheckpointConfig(**{"save_every": 1, **checkpoint}))
    state: Any = HeldState(groups, shapes)
    workload: Any = HeldWorkload()
    root = run_dir / CHECKPOINTS_DIR
    key = on_rank_0(groups, lambda: str(claim(root).key))
    with Saver(workload, recipe, state, Claim.from_key(root, int(key)), start) as saver:
        if disk is not None:
            saver.disk = disk
        yield state, saver


@cache
def groups_of_process() -> ProcessGroups:
    """Built once in each rank. Collective over: world."""
    return build_groups(1, 1)


def wrong_elements(directory: Path, step: int, world_size: int) -> list[str]:
    """What in a checkpoint is not of the instant after a step; empty if all of it is."""
    reader = open_checkpoint(directory)
    wrong = []
    for name, shape in SHAPES.items():
        found = reader.read(name)
        for rank, part in enumerate(found.chunk(world_size)):
            expected = value_at(step, Slice(name, shape, (0,) * len(shape), part))
            if not torch.equal(part, expected):
                wrong.append(f"{name} of rank {rank}: {sorted({int(x) // 1000 for x in part.flatten()})}")
    for rank in range(world_size):
        state = reader.read_state(rank)
        told = (state.step, state.consumed_rows, state.health, state.rng["drawn"].tolist())
        if told != (step, 8 * step, {"updates": step, "window": [step] * 3}, [step, rank]):
            wrong.append(f"state of rank {rank}: {told}")
    return wrong


class ShutDisk(Disk):
    """Tensor files are not written before `gate` is set; `reached` is set by whoever comes to it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        if str(file.name).endswith(".safetensors"):
            self.reached.set()
            assert self.gate.wait(60.0)
        super().write(file, content)


class DiskUntil(Disk):
    """Nothing is written before something is so."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        deadline = time.monotonic() + 60.0
        while not self._condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        super().write(file, content)


class SlowDisk(Disk):
    """Each write takes a while, before and after the bytes are taken."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        time.sleep(self._seconds / 2)
        super().write(file, content)
        time.sleep(self._seconds / 2)


class FullDisk(Disk):
    """No room left for files of some steps, on some ranks."""

    def __init__(self, is_full: Callable[[str], bool]) -> None:
        self._is_full = is_full

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        if self._is_full(str(file.name)):
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        super().write(file, content)


def this_rank() -> int:
    return dist.get_rank()
