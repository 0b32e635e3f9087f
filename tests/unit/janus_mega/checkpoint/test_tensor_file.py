"""Digests are made beside the writing, in order, and are right whatever thread makes them."""

import hashlib
import threading
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from janus_mega.checkpoint import tensor_file
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.tensor_file import TensorFile, write_safetensors


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_digests_are_those_of_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(tensor_file, "_INLINE_BYTES", 100)
    monkeypatch.setattr(tensor_file, "num_hashing_threads", lambda: num_threads)
    tensors = [(f"t{size}", torch.randn(size)) for size in (0, 1, 24, 26, 250, 251, 5000)]
    tensors += [("strided", torch.randn(70, 70)[:, ::2])]  # is copied, so it may not wait for ever
    told: list[str] = []
    path = tmp_path / "a.safetensors"
    digests = write_safetensors(path, tensors, {}, written=told.append)
    assert digests.tensors == {key: hashlib.sha256(raw(tensor)).digest() for key, tensor in tensors}
    assert sorted(told) == sorted(digests.tensors)
    assert TensorFile(path).digests() == digests
    for key, tensor in tensors:
        assert torch.equal(TensorFile(path).read(key, digests.tensors[key]), tensor)


def test_the_writer_does_not_wait_for_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No digest moves until the file is being flushed: a writer that waited for one would never come that far."""
    flushing = threading.Event()

    class Late:
        def __init__(self) -> None:
            self.inner = hashlib.sha256()

        def update(self, data: Any, /) -> None:
            assert flushing.wait(timeout=20), "the writer waits for digests"
            self.inner.update(data)

        def digest(self) -> bytes:
            return self.inner.digest()

    class Flushed(Disk):
        def sync_file(self, file: BinaryIO) -> None:
            flushing.set()
            super().sync_file(file)

    monkeypatch.setattr(tensor_file, "new_digest", Late)
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 2**17)
    tensors = [(f"t{number}", torch.randn(2**17)) for number in range(8)]
    digests = write_safetensors(tmp_path / "a.safetensors", tensors, {}, Flushed())
    assert digests.tensors == {key: hashlib.sha256(raw(tensor)).digest() for key, tensor in tensors}


def test_a_disk_that_fails_ends_the_threads(tmp_path: Path) -> None:
    class Full(Disk):
        left = 5

        def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            super().write(file, content)

    before = threading.active_count()
    with pytest.raises(OSError, match="No space"):
        write_safetensors(tmp_path / "a", [(str(n), torch.randn(2**18)) for n in range(9)], {}, Full())
    assert threading.active_count() == before
