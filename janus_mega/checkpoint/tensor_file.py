"""Safetensors files, written and read by the few lines of this module.

Writing moves one tensor at a time to the CPU and hashes it in a thread beside, so a save needs no second copy of the
model, waits little for digests, and a digest is of what was meant, not of what a disk gave back. Each tensor has a
digest of its own and the file one over those of its header and its tensors, so nothing is hashed twice.

Reading gives out the very bytes that were hashed: a tensor is read into memory, compared with its digest and then
handed over, while a mapped file could change in between. The header is read with more mistrust than the format asks
for: tensors must follow each other without gap or overlap and fill the file to its last byte, so no byte is unaccounted
for. The library reads these files; other people's are read by the library (`hf.importing`).
"""

import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.disk import DISK, Disk

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Number formats by their safetensors name."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_HEAD_BYTES = 100_000_000
"""Longest header, as in the library."""
CHUNK_BYTES = 8 * 2**20
_MAX_DIMS = 64
_MAX_SIZE = 2**63
_INLINE_BYTES = 2**16
_LOOKAHEAD = 8


class Digest(Protocol):
    """What hashlib gives."""

    def update(self, data: Any, /) -> None:
        """Adds bytes."""

    def digest(self) -> bytes:
        """32 bytes over all that was added."""


new_digest: Callable[[], Digest] = hashlib.sha256
"""The one digest of checkpoints."""


class Hashing:
    """Digests made by threads beside; a context manager that has all of them finished when it ends.

    sha256 lets go of the interpreter, so it works while the disk does, where there is a core to spare. Each digest
    belongs to one thread, which keeps its chunks in order.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix="hashing") for _ in range(num_threads)]
        self._owners: dict[int, tuple[Digest, ThreadPoolExecutor]] = {}
        self._pending: deque[Future[None]] = deque()

    def update(self, digest: Digest, chunk: bytes | memoryview, *, is_all: bool = False, is_kept: bool = False) -> None:
        """Adds a chunk, soon; the bytes must stay as they are until the end.

        Args:
            digest: what it is added to.
            chunk: bytes.
            is_all: nothing else is added to this digest, so a small chunk need not wait for its turn.
            is_kept: somebody holds these bytes anyway, so it may wait however long: a disk that flushes a file then
                has digests to keep it company. Otherwise the caller waits once several chunks are behind.
        """
        if is_all and len(chunk) <= _INLINE_BYTES:
            digest.update(chunk)
            return
        self._pending.append(self._owner(digest).submit(digest.update, chunk))
        while not is_kept and len(self._pending) > _LOOKAHEAD:
            self._pending.popleft().result()

    def then(self, digest: Digest, tell: Callable[[], None]) -> None:
        """Calls something once all that was added to a digest so far has been hashed, in its thread."""
        self._pending.append(self._owner(digest).submit(tell))

    def _owner(self, digest: Digest) -> ThreadPoolExecutor:
        pool = self._pools[len(self._owners) % len(self._pools)]
        return self._owners.setdefault(id(digest), (digest, pool))[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=error is not None)
        while self._pending and error is None:
            self._pending.popleft().result()


def num_hashing_threads() -> int:
    """Threads that one rank's save may take: one on a small machine, four beside many cores."""
    return min(4, max(1, len(os.sched_getaffinity(0)) // 8))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, from the beginning of the file."""
    end: int
    """First byte behind it."""


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of one file's parts."""

    num_bytes: int
    """Size of the file."""
    head: bytes
    """Of the length and the header."""
    tensors: dict[str, bytes]
    """Of each tensor by key, in the order of the file."""

    @property
    def tree(self) -> str:
        """Digest of the whole file: over the digests of its parts; hex."""
        return tree_digest(self.head, self.tensors.values())


def tree_digest(head: bytes, tensors: Iterable[bytes]) -> str:
    """SHA-256 over the digest of a file's header followed by those of its tensors in their order; hex."""
    return hashlib.sha256(head + b"".join(tensors)).hexdigest()


def file_rank(tensor: Tensor) -> int:
    """What tensors of a file are ordered by; ties keep their order. Large elements first, so all lie aligned."""
    return -tensor.element_size()


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    disk: Disk = DISK,
    written: Callable[[str], None] | None = None,
) -> Digests:
    """Writes and fsyncs a safetensors file, moving one tensor at a time to the CPU; returns its size and digests.

    Args:
        path: the file.
        tensors: key and values.
        metadata: strings for the header.
        disk: where it happens.
        written: told the key of each tensor, in some thread, once its bytes are not looked at any more.
    """
    ordered = sorted(tensors, key=lambda item: file_rank(item[1]))
    head, size = head_of(path, ordered, metadata)
    digests: dict[str, Digest] = {}
    with disk.create(path) as file, Hashing(num_hashing_threads()) as hashing:
        disk.write(file, head)
        for key, tensor in ordered:
            host = tensor.detach().cpu().contiguous()
            is_kept = host.data_ptr() == tensor.data_ptr()
            raw = memoryview(host.reshape(-1).view(torch.uint8).numpy())
            digest = digests[key] = new_digest()
            for start in range(0, len(raw), CHUNK_BYTES):
                chunk = raw[start : start + CHUNK_BYTES]
                hashing.update(digest, chunk, is_all=len(chunk) == len(raw), is_kept=is_kept)
                disk.write(file, chunk)
            if written is not None:
                hashing.then(digest, partial(written, key))
        disk.sync_file(file)
    return Digests(size, hashlib.sha256(head).digest(), {key: digest.digest() for key, digest in digests.items()})


def head_of(path: Path, ordered: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Length and header of a file, and the size of the whole file.

    Raises:
        ValueError: a key is given twice, or the header is longer than a reader would take.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for key, tensor in ordered:
        if key in header:
            raise ValueError(f"{path.name}: tensor {key} is given twice")
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEAD_BYTES:
        raise ValueError(
            f"{path.name}: a header of {len(text)} bytes for {len(ordered)} tensors, at most {MAX_HEAD_BYTES} are read "
            "again; save on more ranks, so that each file holds fewer pieces"
        )
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, refusing links and whatever else is no file; unbuffered.

    Raises:
        OSError: it is missing, a link, a directory, ...
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"not a file: {path}")
    return open(descriptor, "rb", buffering=0)


class Unreadable(UserError):
    """The system did not give a file of a checkpoint; it may the next time."""


def damaged(path: Path, what: str | OSError) -> UserError:
    """What is said of every damaged file; `Unreadable` where the system has a reason of its own."""
    kind = Unreadable if isinstance(what, OSError) and what.errno is not None else UserError
    why = what.strerror or str(what) if isinstance(what, OSError) else what
    return kind(f"{path}: {why}; the checkpoint is damaged, use an older one")


class TensorFile:
    """A safetensors file whose header was read. Holds no descriptor: there may be thousands of files."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            UserError: there is no such file, or its header breaks a rule of the format or of this module.
        """
        self.path = path
        try:
            with open_regular(path) as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                head = _read_head(file, self.num_bytes)
            self.places = _places(head, self.num_bytes)
        except OSError as error:
            raise damaged(path, error) from None
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"not a safetensors file of ours ({error})") from None
        self.head = hashlib.sha256(head).digest()

    def read(self, key: str, digest: bytes | None) -> Tensor:
        """One tensor, on the CPU, compared with its digest.

        Raises:
            UserError: the bytes are not those, or the file cannot be read.
        """
        place = self.places[key]
        content = torch.empty(place.end - place.start, dtype=torch.uint8)
        view = memoryview(content.numpy())
        found = new_digest()
        try:
            with open_regular(self.path) as file, Hashing() as hashing:
                file.seek(place.start)
                for start in range(0, len(view), CHUNK_BYTES):
                    chunk = view[start : start + CHUNK_BYTES]
                    _read_into(file, chunk)
                    if digest is not None:
                        hashing.update(found, chunk, is_all=len(chunk) == len(view))
        except OSError as error:
            raise damaged(self.path, error) from None
        if digest is not None and found.digest() != digest:
            raise damaged(self.path, f"bytes do not match the SHA-256 of {key}")
        return content.view(place.dtype).reshape(place.shape)

    def digests(self, whole: Digest | None = None) -> Digests:
        """Digests of all parts as the disk holds them, read once from beginning to end in chunks.

        Args:
            whole: is given every byte of the file too.

        Raises:
            OSError: the file cannot be read, or has changed.
        """
        tensors: dict[str, Digest] = {}
        with open_regular(self.path) as file, Hashing() as hashing:
            head = _read_head(file, self.num_bytes)
            if whole is not None:
                hashing.update(whole, head)
            for key, place in self.places.items():
                digest = tensors[key] = new_digest()
                for chunk in _chunks(file, place.end - place.start):
                    hashing.update(digest, chunk)
                    if whole is not None:
                        hashing.update(whole, chunk)
        found = {key: digest.digest() for key, digest in tensors.items()}
        return Digests(self.num_bytes, hashlib.sha256(head).digest(), found)


def _chunks(file: BinaryIO, size: int) -> Iterator[memoryview]:
    """The next `size` bytes, each chunk in memory of its own: a thread may still be hashing the one before."""
    while size:
        chunk = memoryview(bytearray(min(size, CHUNK_BYTES)))
        _read_into(file, chunk)
        size -= len(chunk)
        yield chunk


def _read_into(file: BinaryIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file ends too early")
        view = view[count:]


def _read_head(file: BinaryIO, size: int) -> bytes:
    """Length and header of a file."""
    if size < 8:
        raise ValueError(f"{size} bytes hold no header")
    length = bytearray(8)
    _read_into(file, memoryview(length))
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > min(size - 8, MAX_HEAD_BYTES):
        raise ValueError(f"a header of {num_bytes} bytes in a file of {size}")
    header = bytearray(num_bytes)
    _read_into(file, memoryview(header))
    return bytes(length + header)


def _places(head: bytes, size: int) -> dict[str, Place]:
    """Where each tensor lies, in the order of the file.

    Raises:
        ValueError: a rule is broken.
    """
    header = json.loads(head[8:].decode("utf-8"), object_pairs_hook=_without_repeats)
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata other than strings")
    places, end = {}, len(head)
    for key, entry in header.items():
        place = _place(key, entry, len(head))
        if place.start != end:
            raise ValueError(f"{key!r} does not begin where the tensor before it ends")
        end = place.end
        places[key] = place
    if end != size:
        raise ValueError(f"tensors end at byte {end} of {size}")
    return places


def _place(key: str, entry: Any, origin: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} is described by other fields than dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{key!r} has the unknown number format {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{key!r} has a shape or offsets that are no sizes")
    if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise ValueError(f"{key!r}: shape and number format ask for other than its bytes")
    return Place(dtype, tuple(shape), origin + offsets[0], origin + offsets[1])


def are_sizes(values: Any) -> bool:
    """Whether something out of a JSON file is a short list of natural numbers."""
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMS
        and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found
