"""Snapshots are of one instant, stay within their bound and reuse their memory, whatever is in them."""

import hashlib
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from janus_mega.checkpoint import tensor_file
from janus_mega.checkpoint.staging import Staging, failed, in_file_order, live
from janus_mega.parallel.slices import Slice

MIB = 2**20


def slices_of(tensors: dict[str, Tensor]) -> list[Slice]:
    return [Slice(name, tuple(x.shape), (0,) * x.dim(), x) for name, x in tensors.items()]


def mixed() -> dict[str, Tensor]:
    """Every shape that needs care: a scalar, nothing at all, a view with gaps, other number formats."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 30, generator=generator)
    return {
        "bytes": torch.randint(0, 255, (77,), dtype=torch.uint8, generator=generator),
        "table": table,
        "part": table[3:20, 4:9],
        "half": torch.randn(33, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "steps": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
    }


@pytest.mark.parametrize("limit", [0, 10**9, 5000, 300, 1])
def test_a_snapshot_keeps_what_was(limit: int) -> None:
    tensors = mixed()
    before = {name: x.clone() for name, x in tensors.items()}
    snapshot = Staging(limit).snapshot(slices_of(tensors))
    assert [piece.name for piece in snapshot] == [piece.name for piece in in_file_order(slices_of(tensors))]
    copied = snapshot.slices[snapshot.num_live :]
    for x in tensors.values():
        x.zero_()
    for piece in copied:
        assert piece.tensor.dtype == before[piece.name].dtype
        assert torch.equal(piece.tensor, before[piece.name]), piece.name
    for piece in snapshot.slices[: snapshot.num_live]:
        assert piece.tensor is tensors[piece.name]
    assert bool(snapshot.num_live) == (limit in (5000, 300, 1))


@pytest.mark.parametrize("limit", [5000, 300, 1])
def test_the_bound_holds_and_is_used(limit: int) -> None:
    staging = Staging(limit)
    snapshot = staging.snapshot(slices_of(mixed()))
    assert staging.num_bytes <= limit
    last_live = snapshot.slices[snapshot.num_live - 1].tensor
    assert staging.num_bytes + last_live.numel() * last_live.element_size() + 64 > limit


def test_live_pieces_are_free_once_all_of_them_are_written() -> None:
    snapshot = Staging(300).snapshot(slices_of(mixed()))
    for number in range(snapshot.num_live):
        assert not snapshot.free.is_set()
        snapshot.written(number)
    assert snapshot.free.is_set()
    assert Staging().snapshot(slices_of(mixed())).free.is_set()
    assert not live(slices_of(mixed())).free.is_set()


def test_what_failed_is_told_to_the_writer() -> None:
    with pytest.raises(MemoryError, match="no room"):
        list(failed(MemoryError("no room")))


def own_bytes() -> int:
    """What this process holds that is no file, whoever else shares its pages (children of other tests come and go)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that this process holds more, at most, while it works."""
    before, seen, ended = own_bytes(), [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            seen.append(own_bytes())

    watching = threading.Thread(target=look)
    watching.start()
    work()
    ended.set()
    watching.join()
    return max(*seen, own_bytes()) - before


def test_memory_is_made_ahead_and_used_again() -> None:
    tensors = {f"t{number}": torch.randn(8 * MIB // 4) for number in range(8)}
    staging = Staging()
    staging.prepare(slices_of(tensors))
    taken = []
    assert peak_of(lambda: taken.append(staging.snapshot(slices_of(tensors)))) < 70 * MIB  # 64 MiB of slices
    address = taken[0].slices[0].tensor.data_ptr()
    taken.clear()
    for _ in range(3):
        assert peak_of(lambda: taken.append(staging.snapshot(slices_of(tensors)))) < 4 * MIB
        assert taken.pop().slices[0].tensor.data_ptr() == address
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    staging.snapshot(slices_of(tensors))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    assert faults < 64 * MIB / 4096 / 8  # no new pages, which are what makes a first copy slow
    tensors["more"] = torch.randn(8 * MIB // 4)
    assert peak_of(lambda: staging.snapshot(slices_of(tensors))) < 12 * MIB  # the old buffer is gone before the new


class SlowDigest:
    """SHA-256 that comes long after the bytes were written."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, data: bytes) -> None:
        time.sleep(0.02)
        self._digest.update(data)

    def digest(self) -> bytes:
        return self._digest.digest()


def test_a_live_piece_is_let_go_only_when_it_is_written_and_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "new_digest", SlowDigest)
    tensors = {f"t{number}": torch.randn(100_000) for number in range(4)}
    before = {name: x.clone() for name, x in tensors.items()}
    told: list[str] = []

    def written(key: str) -> None:
        tensors[key].zero_()  # as the next update may, from now on
        told.append(key)

    path = tmp_path / "tensors.safetensors"
    digests = tensor_file.write_safetensors(path, list(tensors.items()), {}, written=written)
    monkeypatch.undo()
    assert told == list(tensors)
    assert tensor_file.TensorFile(path).digests() == digests
    found = tensor_file.TensorFile(path)
    assert all(torch.equal(found.read(name, None), x) for name, x in before.items())
