"""A checkpoint is whole or absent, any layout reads what any other wrote, and damage of every kind is noticed."""

import errno
import json
import os
import pickle
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import UserError
from janus_mega.checkpoint import format as format_module
from janus_mega.checkpoint import manager, tensor_file
from janus_mega.checkpoint.claim import claim, unclaimed
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.format import find_damage, rank_file
from janus_mega.checkpoint.manager import (
    find_latest,
    list_checkpoints,
    load_state,
    load_weights,
    read_tensor_box,
    save_checkpoint,
)
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.checkpoint.tensor_file import DTYPE_NAMES, TensorFile, write_safetensors
from janus_mega.parallel.slices import Box, Slice
from tests.support.checkpoints import TENSORS, rows_of, save_on_threads, state


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def test_our_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = [(f"t{i}", torch.arange(5).to(dtype)) for i, dtype in enumerate(DTYPE_NAMES)]
    tensors += [("empty", torch.empty(0, 3)), ("scalar", torch.tensor(1.5)), ("strided", torch.ones(3, 4)[:, ::2])]
    digests = write_safetensors(tmp_path / "a.safetensors", tensors, {"step": "1"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert digests == file.digests() and file.head == digests.head
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == dict(tensors).keys()
    for name, tensor in tensors:
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
        ours = file.read(name, digests.tensors[name])
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape and torch.equal(ours, tensor)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_reads_the_same_tensors(tmp_path: Path, world_size: int, no_unpickling: None) -> None:
    results = save_on_threads(tmp_path, world_size, lambda rank: rows_of(rank, world_size))
    directory = tmp_path / "step-00000003"
    assert results == [directory] * world_size
    assert find_latest(tmp_path) == directory
    reader = open_checkpoint(directory)
    for name, tensor in TENSORS.items():
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
    box = Box((1, 1), (4, 2))
    assert torch.equal(read_tensor_box(directory, next(iter(TENSORS)), box), TENSORS[next(iter(TENSORS))][1:5, 1:3])
    assert set(load_weights(directory)) == {name for name in TENSORS if not name.startswith("optimizer.")}
    loaded = load_state(directory, rank=world_size - 1)
    assert (loaded.step, loaded.consumed_rows, loaded.plan_digest) == (3, 24, "ab12")
    assert loaded.config_text == "name: x\n"
    assert loaded.rng["torch"].tolist() == [world_size - 1] * 4
    assert load_state(directory, rank=world_size).rng == {}
    assert reader.read_bytes("text_tokenizer/tokenizer.model") == b"pieces"


def test_missing_and_doubled_pieces_publish_nothing(tmp_path: Path) -> None:
    lost = save_on_threads(tmp_path, 2, lambda rank: rows_of(0, 2) if rank == 0 else [])
    assert isinstance(lost[0], ValueError) and "are missing" in str(lost[0])
    assert isinstance(lost[1], OSError)
    doubled = save_on_threads(tmp_path, 2, lambda rank: rows_of(0, 1))
    assert isinstance(doubled[0], ValueError) and "more than once" in str(doubled[0])
    assert list_checkpoints(tmp_path) == [] and find_latest(tmp_path) is None


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_hangs_nobody_and_publishes_nothing(tmp_path: Path, failing: int) -> None:
    def slices(rank: int) -> list[Slice]:
        if rank == failing:
            return [Slice("w", (2,), (0,), torch.zeros(2, dtype=torch.complex64))]  # no name in safetensors
        return rows_of(rank, 2)

    results = save_on_threads(tmp_path, 2, slices)
    assert isinstance(results[failing], KeyError)
    assert isinstance(results[1 - failing], OSError)
    assert find_latest(tmp_path) is None
    assert all(isinstance(result, Path) for result in save_on_threads(tmp_path, 2, lambda rank: rows_of(rank, 2)))


def save_one(root: Path, step: int) -> Path:
    return save_checkpoint(root, rows_of(0, 1), state(step), extra_files={"sub/tokenizer.json": b"{}"})


def test_same_step_again_is_a_new_directory_and_wins(tmp_path: Path) -> None:
    first, second = save_one(tmp_path, 5), save_one(tmp_path, 5)
    assert (first.name, second.name) == ("step-00000005", "step-00000005-1")
    assert find_latest(tmp_path) == second


def test_only_the_rank_that_renamed_must_see_the_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = manager._at_step

    def cached(root: Path, step: int) -> list[manager.Found]:
        if threading.current_thread() is threads["blind"]:
            return []
        if threading.current_thread() is threads["lost"]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return seen(root, step)

    threads: dict[str, threading.Thread] = {}
    monkeypatch.setattr(manager, "_at_step", cached)

    def slices(rank: int) -> list[Slice]:
        threads[("first", "blind", "lost")[rank]] = threading.current_thread()
        return rows_of(rank, 3)

    assert save_on_threads(tmp_path, 3, slices) == [tmp_path / "step-00000003"] * 3


def test_tables_are_compact_and_what_could_not_be_read_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (save_one(tmp_path, 1) / "tensors.json").read_bytes()
    assert table == json.dumps(json.loads(table), sort_keys=True, separators=(",", ":")).encode()
    longest = max(path.stat().st_size for path in (tmp_path / "step-00000001").glob("*.json"))
    monkeypatch.setattr(format_module, "_MAX_JSON_BYTES", longest)
    assert find_damage(save_one(tmp_path, 2)) is None
    monkeypatch.setattr(format_module, "_MAX_JSON_BYTES", len(table) - 1)
    with pytest.raises(ValueError, match=rf"tensors\.json: {len(table)} bytes, at most .*; save on fewer ranks"):
        save_one(tmp_path, 3)
    monkeypatch.undo()
    head = int.from_bytes((tmp_path / "step-00000001" / rank_file(0)).read_bytes()[:8], "little")
    monkeypatch.setattr(tensor_file, "MAX_HEAD_BYTES", head)
    assert find_damage(save_one(tmp_path, 4)) is None
    monkeypatch.setattr(tensor_file, "MAX_HEAD_BYTES", head - 1)
    with pytest.raises(ValueError, match=rf"header of {head} bytes for 4 tensors, at most {head - 1} .* save on more"):
        save_one(tmp_path, 5)
    assert [found.step for found in list_checkpoints(tmp_path)] == [1, 2, 4]


def test_damage_of_every_file_is_found_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save_one(tmp_path / "run", 1)
    template = save_one(tmp_path / "run", 2)
    assert find_damage(template) is None
    chooser = random.Random(0)
    trials = 0
    for file in sorted(path for path in template.rglob("*") if path.is_file()):
        content = file.read_bytes()
        damaged = [content[:-1], content + b"\0", b"", None]
        for _ in range(24):
            place = chooser.randrange(len(content))
            flipped = bytes([content[place] ^ (1 << chooser.randrange(8))])
            damaged.append(content[:place] + flipped + content[place + 1 :])
        for bad in damaged:
            file.unlink() if bad is None else file.write_bytes(bad)
            is_harmless = file.name == "manifest.json" and bad is not None and _reads_the_same(bad, content)
            assert (find_damage(template) is None) == is_harmless, (file, bad)
            trials += 1
            if not is_harmless and trials % 20 == 0:
                assert find_latest(tmp_path / "run") == good
                assert template.name in caplog.text
        file.write_bytes(content)
    (template / "stray.bin").write_bytes(b"x")
    assert "stray.bin" in str(find_damage(template))
    assert trials > 100


def _reads_the_same(a: bytes, b: bytes) -> bool:
    """A flip in the white space of JSON changes nothing that is read."""
    return a.split() == b.split()


def test_directory_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    good = save_one(tmp_path, 1)
    shutil.copytree(good, tmp_path / "step-00000009")
    assert find_latest(tmp_path) == good


def test_readers_verify_the_files_they_touch(tmp_path: Path) -> None:
    directory = save_one(tmp_path, 1)
    file = directory / rank_file(0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tensors-00000\.safetensors: bytes do not match"):
        load_weights(directory)
    assert open_checkpoint(directory, verify=False).read("decoder.final_layernorm.weight").shape == (4,)


def test_errors_of_readers_are_one_line(tmp_path: Path) -> None:
    directory = save_one(tmp_path, 1)
    with pytest.raises(UserError, match="no manifest"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds no tensor nothing"):
        open_checkpoint(directory).read("nothing")
    with pytest.raises(UserError, match=r"holds no text_tokenizer\.model"):
        open_checkpoint(directory).path("text_tokenizer.model")
    with pytest.raises(UserError, match="relative name"):
        save_checkpoint(tmp_path, [], state(2), extra_files={"../evil": b""})


def test_retention_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    paths = [save_one(tmp_path, step) for step in range(1, 6)]
    (paths[3] / "config.yaml").unlink()  # step 4 is not whole, so it does not count
    removed = apply_retention(tmp_path, 2)
    assert [path.name for path in removed] == ["step-00000002", "step-00000001"]
    assert find_latest(tmp_path) == paths[4] and find_damage(paths[2]) is None
    (paths[4] / "config.yaml").write_bytes(b"damaged")
    assert apply_retention(tmp_path, 1) == []
    assert find_latest(tmp_path) == paths[2]
    with pytest.raises(UserError, match="at least one"):
        apply_retention(tmp_path, 0)


def test_leftovers_of_a_killed_save_are_ignored_and_replaced(tmp_path: Path) -> None:
    mine = claim(tmp_path)
    (mine.directory / "step-00000001").mkdir()
    (mine.directory / "step-00000001" / rank_file(0)).write_bytes(b"half")
    (mine.directory / ".trash-step-00000000").mkdir()
    assert find_latest(tmp_path) is None
    assert save_checkpoint(mine, rows_of(0, 1), state(1)) == find_latest(tmp_path) == tmp_path / "step-00000001"
    assert list(mine.directory.iterdir()) == []


class Holding(Disk):
    """Somebody has a file open in these folders, so they cannot be removed, under whatever name."""

    def __init__(self, *held: Path) -> None:
        self.held = {path.stat().st_ino for path in held}

    def remove_directory(self, path: Path) -> None:
        if path.stat().st_ino in self.held:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        super().remove_directory(path)


@pytest.mark.parametrize("left_over", ["step-00000001", "step-00000002"])
@pytest.mark.parametrize("place_of", [claim, unclaimed])
def test_leftovers_that_cannot_be_removed_are_not_in_the_way(left_over: str, place_of, tmp_path: Path) -> None:
    mine = place_of(tmp_path)
    held, other = mine.directory / left_over, mine.directory / "step-00000000"
    held.mkdir(parents=True)
    other.mkdir()
    disk, place = Holding(held), mine if mine.number else tmp_path
    for step in (2, 4):
        saved = save_checkpoint(place, rows_of(0, 1), state(step), disk=disk)
        assert saved == find_latest(tmp_path) == tmp_path / f"step-{step:08d}"
    (left,) = mine.directory.iterdir()
    assert left.name == left_over if left_over == "step-00000001" else left.name.startswith(f".trash-{left_over}-")
    save_checkpoint(place, rows_of(0, 1), state(6))
    assert not mine.directory.exists() or list(mine.directory.iterdir()) == []
