"""A safetensors file that is written one tensor after the other, while others are: for who makes many files at once.

`tensor_file.write_safetensors` writes one file of tensors that are all there.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.tensor_file import CHUNK_BYTES, Digests, Hashing, head_of, new_digest


class TensorWriter:
    """A file whose names, shapes and formats are known before; a context manager that fsyncs it in the end."""

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str], disk: Disk = DISK
    ) -> None:
        """Begins a file of these tensors, in their order by `file_rank`; values are not looked at (meta tensors)."""
        self._head, self._size = head_of(path, tensors, metadata)
        self._path = path
        self._disk = disk
        self._digests: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        self._file = self._disk.create(self._path)
        self._disk.write(self._file, self._head)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._disk.sync_file(self._file)

    def write(self, key: str, tensor: Tensor) -> None:
        """Writes and hashes the next tensor; nothing of it is held afterwards."""
        raw = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        digest = new_digest()
        with Hashing() as hashing:
            for start in range(0, len(raw), CHUNK_BYTES):
                chunk = raw[start : start + CHUNK_BYTES]
                hashing.update(digest, chunk, is_all=len(chunk) == len(raw))
                self._disk.write(self._file, chunk)
        self._digests[key] = digest.digest()

    @property
    def digests(self) -> Digests:
        """Size and digests; to be asked for when all is written."""
        return Digests(self._size, hashlib.sha256(self._head).digest(), self._digests)
