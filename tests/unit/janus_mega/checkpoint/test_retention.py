"""What stays and what goes, what retention reads, room on the disk, and how many bytes a save writes."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from data_pipeline.errors import UserError
from janus_mega.checkpoint import format as checkpoint_format
from janus_mega.checkpoint.claim import claim
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.format import find_damage
from janus_mega.checkpoint.manager import find_latest, list_checkpoints, save_checkpoint
from janus_mega.checkpoint.retention import apply_retention, check_space
from janus_mega.parallel.slices import Slice
from tests.support.checkpoints import rows_of, save_on_threads, state


def save_one(root: Path, step: int) -> Path:
    return save_checkpoint(root, rows_of(0, 1), state(step))


def steps(root: Path) -> list[int]:
    return [found.step for found in list_checkpoints(root)]


def test_the_newest_and_those_for_good_stay(tmp_path: Path) -> None:
    mine = claim(tmp_path)
    for step in range(10, 100, 10):
        saved = save_checkpoint(mine, rows_of(0, 1), state(step))
        apply_retention(mine, 2, 30, written=saved)
    assert steps(tmp_path) == [30, 60, 80, 90]
    assert list(mine.directory.iterdir()) == []
    assert apply_retention(mine, 2) == [tmp_path / "step-00000060", tmp_path / "step-00000030"]


def test_the_last_good_one_never_goes(tmp_path: Path) -> None:
    paths = [save_one(tmp_path, step) for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / "tensors-00000.safetensors").write_bytes(b"damaged")
    assert apply_retention(tmp_path, 1) == [] and find_latest(tmp_path) == paths[0]
    newest = save_one(tmp_path, 4)
    assert apply_retention(tmp_path, 2, written=newest) == []  # one whole one is not two
    assert apply_retention(tmp_path, 1, written=newest) == paths[::-1]
    flip(newest)
    assert apply_retention(tmp_path, 1) == []


def test_a_damaged_newest_one_stops_no_removal_and_what_is_known_to_be_bad_does_not_count(tmp_path: Path) -> None:
    paths = [save_one(tmp_path, step) for step in (1, 2, 3, 4)]
    flip(save_one(tmp_path, 9))  # passed over by a start, which went on from a step before it
    flip(paths[2])  # sizes fit, so only who has read it knows
    bad = {"step-00000003", "step-00000009"}
    assert apply_retention(tmp_path, 2, written=paths[3], bad=bad) == [paths[0]]
    assert steps(tmp_path) == [2, 3, 4, 9]
    assert apply_retention(tmp_path, 2, bad=bad) == [] and find_latest(tmp_path) == paths[3]
    assert apply_retention(tmp_path, 1, written=paths[3], bad=bad) == [paths[1]]
    assert apply_retention(tmp_path, 1, written=paths[3]) == [paths[2]]
    assert apply_retention(tmp_path, 1) == []  # nobody vouches for the newest, and it is damaged


def flip(directory: Path) -> None:
    file = directory / "tensors-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_what_was_just_written_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        saved = save_one(tmp_path, step)
    hashed: list[str] = []
    check = checkpoint_format.check_file

    def count(directory: Path, manifest: object, name: str, *, content: bool = True) -> None:
        hashed.extend([f"{directory.name}/{name}"] * content)
        check(directory, manifest, name, content=content)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_format, "check_file", count)
    assert len(apply_retention(tmp_path, 2, written=saved)) == 1 and hashed == []
    assert len(apply_retention(tmp_path, 1)) == 1
    assert hashed and all(name.startswith("step-00000003/") for name in hashed)


def test_left_overs_of_older_attempts_go(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    (tmp_path / ".trash-step-00000000").mkdir()
    (tmp_path / ".trash-step-00000000" / "tensors-00000.safetensors").write_bytes(b"x" * 100)
    (tmp_path / ".attempt-0004-00000000" / "step-00000002").mkdir(parents=True)
    mine = claim(tmp_path)
    assert mine.number == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.directory.name, "step-00000001"]
    (tmp_path / ".trash-x").mkdir()
    apply_retention(mine, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.directory.name, "step-00000001"]


def test_removal_never_follows_links(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_bytes(b"x")
    root = tmp_path / "run"
    for step in (1, 2):
        save_one(root, step)
    (root / "step-00000001" / "linked").symlink_to(tmp_path / "data")
    (root / ".trash-y").symlink_to(tmp_path / "data")
    apply_retention(root, 1)
    assert steps(root) == [2] and (tmp_path / "data" / "precious").exists() and not list(root.glob(".trash*"))


def test_too_little_room_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, usage = tmp_path / "run" / "checkpoints", namedtuple("usage", "total used free")
    one = 2**30
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * one, 0, 3 * one - 1))
    with pytest.raises(UserError, match=r"3\.00 GiB are needed for 3 more .*keep_last 2.* are free; lower checkpoint"):
        check_space(root, one, 2)
    assert not root.exists()
    for step in (1, 2, 3):
        save_one(root, step)
    check_space(root, one, 2)  # two of those there stay, the third makes way
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * one, 0, one - 1))
    with pytest.raises(UserError, match=r"1\.00 GiB are needed for 1 more"):
        check_space(root, one, 2)
    monkeypatch.undo()
    check_space(root, 1, 2)


class Counting(Disk):
    """Counts what is written."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        self.num_bytes += len(content)
        super().write(file, content)


def test_each_fragment_is_written_once(tmp_path: Path) -> None:
    world_size = 4
    tensors = {f"layers.{number}.weight": torch.rand(512, 512) for number in range(24)}
    tensors |= {f"optimizer.exp_avg/layers.{number}.weight": torch.rand(512, 512) for number in range(24)}
    tensors |= {f"layers.{number}.norm": torch.rand(512) for number in range(24)}

    def slices(rank: int) -> list[Slice]:
        part = 512 // world_size
        return [
            Slice(name, tuple(x.shape), (rank * part, 0)[: x.ndim], x[rank * part : (rank + 1) * part])
            for name, x in tensors.items()
        ]

    disks = [Counting() for _ in range(world_size)]
    results = save_on_threads(tmp_path, world_size, slices, disk_of=disks.__getitem__)
    assert isinstance(results[0], Path) and find_damage(results[0]) is None
    floor = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in slices(0))
    shares = [disk.num_bytes / floor for disk in disks]
    assert all(1.0 <= share <= 1.01 for share in shares), shares


@pytest.mark.parametrize("method", ["make_directory", "create", "write", "sync_file", "sync_directory", "rename"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_anywhere_leaves_the_last_good_one_and_no_litter(
    tmp_path: Path, method: str, rank: int
) -> None:
    good = save_on_threads(tmp_path, 2, lambda rank: rows_of(rank, 2), 1)[0]
    for after in range(30):

        class Failing(Disk):
            left = after

        def fail(self: Failing, *args: object) -> object:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return getattr(Disk, method)(self, *args)

        setattr(Failing, method, fail)
        disks = [Failing() if number == rank else Disk() for number in range(2)]
        results = save_on_threads(tmp_path, 2, lambda rank: rows_of(rank, 2), 2, disks.__getitem__)
        if all(isinstance(result, Path) for result in results):
            break
        assert isinstance(results[rank], OSError) and isinstance(results[1 - rank], OSError), after
        published = [found.path for found in list_checkpoints(tmp_path)]
        assert published[0] == good and find_damage(published[0]) is None
        assert all(find_damage(path) is None for path in published)
        assert not [path for path in tmp_path.rglob("*.safetensors") if path.parent not in published]
    else:
        raise AssertionError("never succeeded")
