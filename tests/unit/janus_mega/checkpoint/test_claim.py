"""An attempt that was taken over from publishes nothing and removes nothing, wherever it stands."""

import random
import threading
from pathlib import Path

import pytest
import torch

from janus_mega.checkpoint.claim import Claim, Superseded, claim, list_claims, unclaimed
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.manager import list_checkpoints, save_checkpoint
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.checkpoint.state import TrainState
from janus_mega.parallel.slices import Slice


def save(place: Claim | Path, step: int, disk: Disk | None = None) -> Path:
    state = TrainState(step=step, consumed_rows=0, plan_digest="", config_text="")
    return save_checkpoint(place, [Slice("w", (4,), (0,), torch.arange(4.0))], state, disk=disk or Disk())


class Interrupted(Disk):
    """Lets something else happen just before one of its operations."""

    def __init__(self, at: int, happens: object) -> None:
        self.left, self.happens = at, happens

    def _count(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.happens()  # type: ignore[operator]

    def __getattribute__(self, name: str) -> object:
        if name in ("make_directory", "create", "write", "sync_file", "sync_directory", "rename", "remove_file"):
            self._count()
        return object.__getattribute__(self, name)


def test_attempts_are_numbered_on_and_keep_one_folder(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    first = claim(root)
    save(first, 1)
    second = claim(root)
    assert (first.number, second.number) == (1, 2) and list_claims(root) == [second]
    assert Claim.from_key(root, second.key) == second and second.key < 2**62
    assert second.directory.stat().st_mode & 0o777 == root.stat().st_mode & 0o777 == 0o750
    with pytest.raises(Superseded, match="attempt 2 has taken over from attempt 1"):
        claim(root, number=1)
    with pytest.raises(Superseded):
        first.check()
    assert claim(root, number=7).number == 7 and not list(root.glob(".trash*"))


def test_a_fenced_attempt_publishes_and_removes_nothing_wherever_it_stands(tmp_path: Path) -> None:
    outcomes = set()
    for at in range(60):
        root = tmp_path / str(at)
        old = claim(root)
        save(old, 1)
        save(old, 2)
        taken_over: list[list[Path]] = []

        def take_over(root: Path = root, seen: list[list[Path]] = taken_over) -> None:
            claim(root)
            seen.append([found.path for found in list_checkpoints(root)])

        disk = Interrupted(at, take_over)
        try:
            save(old, 3, disk)
            apply_retention(old, 1, disk=disk)
            outcomes.add("done")
        except Superseded:
            outcomes.add("superseded")
        if taken_over:
            assert [found.path for found in list_checkpoints(root)] == taken_over[0], at
            assert all((path / "manifest.json").exists() for path in taken_over[0])
    assert outcomes == {"done", "superseded"}


def test_attempts_that_race_leave_one_winner(tmp_path: Path) -> None:
    chooser = random.Random(0)
    for trial in range(50):
        root = tmp_path / str(trial)
        winners: list[Claim] = []
        given = [chooser.choice([None, 1, 2]) for _ in range(3)]

        def run(number: int | None, root: Path = root, winners: list[Claim] = winners) -> None:
            try:
                winners.append(claim(root, number))
            except Superseded:
                return

        threads = [threading.Thread(target=run, args=(number,)) for number in given]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alive = list_claims(root)
        assert len(alive) == 1 and alive[0] in winners and alive[0] == max(winners)


def test_who_saves_without_a_claim_leaves_no_folder_and_is_fenced_too(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    unclaimed(tmp_path).directory.mkdir()
    mine = claim(tmp_path)
    assert list_claims(tmp_path) == [mine]
