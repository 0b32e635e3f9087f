"""The checkpoint to go on from: found by all ranks together, damaged ones passed over, nothing begun over lost work."""

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from janus_mega.checkpoint import finding, tensor_file
from janus_mega.checkpoint import format as format_module
from janus_mega.checkpoint.claim import claim
from janus_mega.checkpoint.finding import Seekers, find_newest, note_published, why_not_from_scratch
from janus_mega.checkpoint.format import MANIFEST_FILE, UnknownSchema
from janus_mega.checkpoint.manager import Ranks, save_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.parallel.slices import Slice

WORLD = 3


class Team:
    """Ranks as threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._votes = [True] * size
        self._shared = b""

    def agree(self, rank: int, ok: bool) -> bool:
        self._votes[rank] = ok
        self._barrier.wait()
        result = all(self._votes)
        self._barrier.wait()
        return result

    def share(self, rank: int, content: bytes) -> bytes:
        if rank == 0:
            self._shared = content
        self._barrier.wait()
        result = self._shared
        self._barrier.wait()
        return result

    def seekers(self, rank: int) -> Seekers:
        return Seekers(rank, self.size, lambda ok: self.agree(rank, ok), lambda content: self.share(rank, content))

    def all(self, fn) -> list:
        results: list = [None] * self.size

        def call(rank: int) -> None:
            try:
                results[rank] = fn(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def save(root: Path, step: int) -> Path:
    """A checkpoint of three ranks with some tensors each."""
    team = Team(WORLD)

    def save_rank(rank: int) -> Path:
        pieces = [Slice(f"w{rank}", (64,), (0,), torch.full((64,), float(step + rank)))]
        state = TrainState(step=step, consumed_rows=step, plan_digest="p", config_text="name: x\n")
        return save_checkpoint(root, pieces, state, ranks=Ranks(rank, WORLD, lambda ok: team.agree(rank, ok)))

    path = team.all(save_rank)[0]
    assert isinstance(path, Path), path
    return path


@pytest.fixture
def caplog_of_ours(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("janus_mega")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


def flip(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def find(root: Path) -> list:
    team = Team(WORLD)
    return team.all(lambda rank: find_newest(root, team.seekers(rank)))


@pytest.mark.parametrize("name", [f"tensors-{rank:05d}.safetensors" for rank in range(WORLD)] + ["state.json"])
def test_all_ranks_pass_over_what_one_finds_damaged(
    name: str, tmp_path: Path, caplog_of_ours: pytest.LogCaptureFixture
) -> None:
    good, newest = save(tmp_path, 2), save(tmp_path, 4)
    assert find(tmp_path) == [newest] * WORLD
    flip(newest / name)
    assert find(tmp_path) == [good] * WORLD
    told = [record.getMessage() for record in caplog_of_ours.records if "passing over" in record.getMessage()]
    assert len(told) == 1 and str(newest / name) in told[0]  # one rank hashed it, and told


def test_content_is_hashed_once_over_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = save(tmp_path, 4)
    hashed, real = [], finding.check_file

    def counted(directory, manifest, name):
        hashed.append(name)
        return real(directory, manifest, name)

    monkeypatch.setattr(finding, "check_file", counted)
    assert find(tmp_path) == [newest] * WORLD
    files = [path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()]
    assert sorted(hashed) == sorted(set(files) - {"manifest.json"})


def test_a_checkpoint_of_a_newer_version_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    newest = save(tmp_path, 4)

    def read(path):
        if path == newest:
            raise UnknownSchema("schema 9")
        return real(path)

    real = finding.read_manifest
    monkeypatch.setattr(finding, "read_manifest", read)
    assert [type(error) for error in find(tmp_path)] == [UnknownSchema] * WORLD


def refusing(module, monkeypatch: pytest.MonkeyPatch, victim: Path, code: int, times: int) -> list[int]:
    """Lets the system refuse a file so many times; returns what grows with each."""
    refused: list[int] = []
    real = module.open_regular

    def open_or_refuse(path):
        if path == victim and len(refused) < times:
            refused.append(code)
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    monkeypatch.setattr(module, "open_regular", open_or_refuse)
    return refused


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENOENT])
@pytest.mark.parametrize(
    ("module", "name"), [(tensor_file, "tensors-00002.safetensors"), (format_module, MANIFEST_FILE)]
)
def test_a_file_that_is_refused_for_a_moment_costs_no_checkpoint(
    code: int, module, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    refused = refusing(module, monkeypatch, newest / name, code, 2)
    assert find(tmp_path) == [newest] * WORLD
    assert refused == [code] * 2


def test_a_file_that_stays_refused_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, newest = save(tmp_path, 2), save(tmp_path, 4)
    refused = refusing(tensor_file, monkeypatch, newest / "tensors-00002.safetensors", errno.EIO, 99)
    assert find(tmp_path) == [good] * WORLD
    assert len(refused) >= 3


def test_bytes_that_are_others_are_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, newest = save(tmp_path, 2), save(tmp_path, 4)
    flip(newest / "tensors-00001.safetensors")
    pauses: list[float] = []
    monkeypatch.setattr(finding.time, "sleep", pauses.append)
    assert find(tmp_path) == [good] * WORLD
    assert pauses == []


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find(tmp_path / "nowhere") == [None] * WORLD


def test_a_start_from_scratch_is_refused_only_where_work_would_be_lost(tmp_path: Path) -> None:
    root, trained = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    assert why_not_from_scratch(root, trained) is None
    trained.touch()
    assert "its checkpoints are not" in str(why_not_from_scratch(root, trained))
    claim(root)  # an attempt that was ended before its first checkpoint
    assert why_not_from_scratch(root, trained) is None
    note_published(root)
    note_published(root)
    assert "now holds none" in str(why_not_from_scratch(root, trained))
    save(root, 2)
    assert "none of its checkpoints is whole" in str(why_not_from_scratch(root, trained))
