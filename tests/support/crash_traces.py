"""Scenes of a training's life, played on a recording disk: what crash tests take their operations from.

The real functions write real small checkpoints, by ranks on threads that agree through a barrier. Right after a call
returned, what it wrote is read back and compared with what went in, tensor for tensor.
"""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_mega.checkpoint.claim import Claim, claim
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.finding import note_published
from janus_mega.checkpoint.format import MANIFEST_FILE, find_damage, rank_file
from janus_mega.checkpoint.manager import Ranks, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.checkpoint.state import TrainState
from janus_mega.parallel.slices import Slice
from tests.support.crash_disk import MEET, Operation, PowerCut, Recording, dying_disk
from tests.support.crash_rules import Acknowledged, Begun, Damaged, Written, content_of

ROOT = "run/checkpoints"
EXTRA_FILES = {"text_tokenizer/tokenizer.model": b"pieces " * 7}


def tensors_at(step: int) -> dict[str, Tensor]:
    """What a checkpoint of a step holds; every value tells the step."""
    return {
        "decoder.layers.0.weight": torch.arange(24.0).reshape(6, 4) + step,
        "decoder.norm.weight": torch.full((4,), step, dtype=torch.bfloat16),
        "optimizer.exp_avg/decoder.norm.weight": torch.linspace(step, step + 1, 4).double(),
        "understanding_scale": torch.tensor(step),
    }


def slices_of(tensors: dict[str, Tensor], rank: int, world_size: int) -> list[Slice]:
    """Tensors cut by rows over ranks; scalars are rank 0's."""
    pieces = []
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            pieces += [Slice(name, (), (), tensor)] if rank == 0 else []
            continue
        rows = -(-tensor.shape[0] // world_size)
        part = tensor[rank * rows : (rank + 1) * rows]
        if len(part):
            pieces.append(Slice(name, tuple(tensor.shape), (rank * rows,) + (0,) * (tensor.ndim - 1), part))
    return pieces


def state_at(step: int, rank: int = 0) -> TrainState:
    """Where the run stands at a step."""
    return TrainState(
        step=step,
        consumed_rows=8 * step,
        plan_digest="ab12",
        config_text=f"name: run\nsteps: {step}\n",
        rng={"torch": torch.full((8,), rank, dtype=torch.uint8)},
    )


def difference(directory: Path, step: int) -> str | None:
    """One line about what a checkpoint has other than `tensors_at(step)`, or None; reads it by the library's reader."""
    damage = find_damage(directory)
    if damage is not None:
        return damage
    reader, expected = open_checkpoint(directory), tensors_at(step)
    names = [name for name in reader.names if not name.startswith("rng/")]
    if set(names) != set(expected):
        return f"{directory}: holds {sorted(names)}, not {sorted(expected)}"
    for name, tensor in expected.items():
        if not torch.equal(reader.read(name), tensor):
            return f"{directory}: {name} has other values"
    state = reader.read_state()
    if (state.step, state.consumed_rows, state.config_text) != (step, 8 * step, state_at(step).config_text):
        return f"{directory}: the state is of another step: {state}"
    return None


def on_threads(world_size: int, run: Callable[[int], Any], give_up: Callable[[], None]) -> list[Any]:
    """`run(rank)` of every rank; raises what a rank raised, and ends all when the power of one is cut."""
    results: list[Any] = [None] * world_size

    def keep(rank: int) -> None:
        try:
            results[rank] = run(rank)
        except BaseException as error:
            results[rank] = error
            if isinstance(error, PowerCut):
                give_up()

    threads = [threading.Thread(target=keep, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise min(failures, key=lambda failure: not isinstance(failure, PowerCut))
    return results


class Meeting:
    """Lets ranks on threads agree, and writes down that they met."""

    def __init__(self, recording: Recording, world_size: int) -> None:
        self._recording = recording
        self._barrier = threading.Barrier(world_size)
        self.give_up = self._barrier.abort
        self._said = [True] * world_size

    def of(self, rank: int) -> Callable[[bool], bool]:
        """The `agree` of one rank."""

        def agree(ok: bool) -> bool:
            self._said[rank] = ok
            self._recording.meet(rank)
            self._barrier.wait(timeout=60)
            answer = all(self._said)
            self._barrier.wait(timeout=60)
            return answer

        return agree


@dataclass
class Scene:
    """One recording in the making."""

    base: Path
    world_size: int = 1
    make_disk: Callable[[Recording, int], Disk] = Recording.disk
    """The disk of a rank; tests of planted bugs hand in one that does not do what it is told."""
    recording: Recording = field(init=False)
    written: list[Written] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What was found wrong with something right after its call had returned, without any crash."""
    disks: list[Disk] = field(init=False)
    _num_begun: int = 0

    def __post_init__(self) -> None:
        self.recording = Recording(self.base)
        self.restart()
        # What starts a training makes the run directory, and makes nothing durable.
        self.recording.disk().make_directory(self.root.parent)
        self.meet_all()

    def restart(self, make_disk: Callable[[Recording, int], Disk] | None = None) -> None:
        """Another process of each rank; it knows nothing of what the disks of the last one were told."""
        make_disk = make_disk or self.make_disk
        self.disks = [make_disk(self.recording, rank) for rank in range(self.world_size)]

    @property
    def root(self) -> Path:
        """Directory of checkpoints."""
        return self.base / ROOT

    def claim(self) -> Claim:
        """A new attempt takes over."""
        mine = claim(self.root, disk=self.disks[0])
        self.meet_all()
        return mine

    def meet_all(self) -> None:
        """All ranks wait for what rank 0 did."""
        for rank in range(self.world_size):
            self.recording.meet(rank)

    def save(
        self, place: Path | Claim, step: int, must_stay: bool = True, extra_files: dict[str, bytes] = EXTRA_FILES
    ) -> Path:
        """All ranks save; what was written is compared with what went in."""
        label = self._begin(f"step {step}")
        tensors, meeting = tensors_at(step), Meeting(self.recording, self.world_size)

        def run(rank: int) -> Path:
            path = save_checkpoint(
                place,
                slices_of(tensors, rank, self.world_size),
                state_at(step, rank),
                ranks=Ranks(rank, self.world_size, meeting.of(rank)),
                extra_files=extra_files,
                about={"commit": "c0ffee"},
                disk=self.disks[rank],
            )
            self.recording.note(Acknowledged(label), rank)
            return path

        path = on_threads(self.world_size, run, meeting.give_up)[0]
        self.meet_all()
        self._keep(label, path.parent, path, must_stay=must_stay)
        problem = difference(path, step)
        if problem is not None:
            self.problems.append(problem)
        return path

    def write(self, folder: Path, run: Callable[[Disk], Path]) -> Path:
        """`run(disk)` writes something into a folder of its own and returns where it is."""
        label = self._begin(folder.name)
        path = run(self.disks[0])
        self.recording.note(Acknowledged(label))
        self._keep(label, folder, path, is_export=path == folder)
        return path

    def cut_short(self, at: Callable[[int, str, Path], bool], run: Callable[[], Any]) -> bool:
        """The processes end at the first operation that `at(number, kind, path)` names; others begin.

        What was published already, though its call never returned, may be found from now on if it is right. Returns
        False if they never came so far.
        """
        self.disks, is_cut = [dying_disk(at, disk) for disk in self.disks], True
        with suppress(PowerCut):
            run()
            is_cut = False
        self.restart()
        self._meet_after_cut()
        known = {item.content for item in self.written}
        for path in sorted(self.root.glob("step-*")):
            content, step = content_of(path), int(path.name.split("-")[1])
            if content not in known:
                problem = difference(path, step)
                self.problems += [problem] if problem else []
                self._keep(f"{self._num_begun}. step {step}", self.root, path, must_stay=False)
        return is_cut

    def _meet_after_cut(self) -> None:
        """The ranks end at different places; what comes later comes after the end of all."""
        met = Counter(op.rank for op in self.recording.operations if op.kind == MEET)
        for rank in range(self.world_size):
            for _ in range(max(met.values()) - met[rank]):
                self.recording.meet(rank)
        self.meet_all()

    def damage(self, path: Path, label: str) -> None:
        """Turns a bit of a file over."""
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        name = path.relative_to(self.base).as_posix()
        self.recording.note(Damaged(label, path.parent.name))
        self.recording.operations.append(Operation("damage", 0, path=name, content=bytes(content)))

    def _begin(self, what: str) -> str:
        self._num_begun += 1
        label = f"{self._num_begun}. {what}"
        self.recording.note(Begun(label))
        return label

    def _keep(self, label: str, folder: Path, path: Path, *, must_stay: bool = True, is_export: bool = False) -> None:
        name = folder.relative_to(self.base).as_posix()
        self.written.append(Written(label, name, content_of(path), is_export=is_export, must_stay=must_stay))

    def retain(self, place: Path | Claim, keep_last: int, keep_every: int = 0, written: Path | None = None) -> None:
        """What rank 0 does after a save."""
        note_published(self.root, self.disks[0])
        apply_retention(place, keep_last, keep_every, written=written, disk=self.disks[0])
        self.meet_all()


def play_save(scene: Scene) -> None:
    """One attempt saves once."""
    scene.save(scene.claim(), 3)


def play_second_save(scene: Scene) -> None:
    """One attempt saves twice."""
    mine = scene.claim()
    scene.save(mine, 3)
    scene.save(mine, 6)


def play_unclaimed(scene: Scene) -> None:
    """Saves of somebody without a claim."""
    scene.save(scene.root, 3)
    scene.save(scene.root, 6)


def play_retention(scene: Scene) -> None:
    """The newest two stay."""
    mine = scene.claim()
    for step in (2, 4, 6, 8):
        path = scene.save(mine, step, must_stay=step >= 6)
        scene.retain(mine, 2, written=path)


def play_keep_last_one(scene: Scene) -> None:
    """Only the newest stays."""
    mine = scene.claim()
    for step in (2, 4, 6):
        path = scene.save(mine, step, must_stay=step >= 6)
        scene.retain(mine, 1, written=path)


def play_keep_every(scene: Scene) -> None:
    """The newest, and every step that is a multiple of four, stay."""
    mine = scene.claim()
    for step in (2, 4, 6, 8):
        scene.save(mine, step, must_stay=step in (4, 8))
        scene.retain(mine, 1, keep_every=4)


def play_same_step(scene: Scene) -> None:
    """A step is saved again."""
    mine = scene.claim()
    for _ in range(3):
        scene.save(mine, 5)


def play_new_attempt(scene: Scene) -> None:
    """Another attempt takes over after a save, and goes on."""
    scene.save(scene.claim(), 3)
    mine = scene.claim()
    path = scene.save(mine, 6)
    scene.retain(mine, 2, written=path)
    scene.claim()


def play_newest_damaged(scene: Scene) -> None:
    """The medium damages the newest before retention looks at it."""
    mine = scene.claim()
    scene.save(mine, 3)
    path = scene.save(mine, 6, must_stay=False)
    scene.damage(path / rank_file(0), scene.written[-1].label)
    scene.retain(mine, 1)


def play_killed_and_again(scene: Scene) -> None:
    """A save ends before its manifest; the attempt, which lives on, saves the step again, with other files."""
    mine = scene.claim()
    scene.cut_short(
        lambda number, kind, path: path.name == MANIFEST_FILE,
        lambda: scene.save(mine, 5, extra_files=EXTRA_FILES | {"notes.txt": b"of the first save"}),
    )
    scene.save(mine, 5)


def play_killed_at(scene: Scene, at: int) -> bool:
    """The process ends at some operation of two saves with retention; the next attempt goes on. False: it never did."""

    def first() -> None:
        mine = scene.claim()
        for step in (2, 4):
            scene.retain(mine, 1, written=scene.save(mine, step, must_stay=False))

    is_cut = scene.cut_short(lambda number, kind, path: number >= at, first)
    mine = scene.claim()
    scene.retain(mine, 1, written=scene.save(mine, 6))
    return is_cut


SCENES: dict[str, Callable[[Scene], None]] = {
    "save": play_save,
    "second save": play_second_save,
    "unclaimed": play_unclaimed,
    "retention": play_retention,
    "keep last one": play_keep_last_one,
    "keep every": play_keep_every,
    "same step": play_same_step,
    "new attempt": play_new_attempt,
    "newest damaged": play_newest_damaged,
    "killed and again": play_killed_and_again,
}
"""By name."""
