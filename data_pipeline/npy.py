"""Headers of .npy files, read strictly: numpy's own reader evaluates the header as Python, so that damage there raises
whatever a parser can raise, and a damaged shape may ask for more memory than there is.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 1 << 16
_PLAIN = re.compile(
    r"\{'descr': '([<>|=][biufc][0-9]{1,2})', 'fortran_order': False, "
    r"'shape': \(([0-9]*,? ?[0-9, ]*)\), \} *\n"
)


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What a .npy says of itself."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """First byte of the values."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file."""
        count = 1
        for size in self.shape:
            count *= size
        return self.start + count * self.dtype.itemsize


def parse_npy_header(head: bytes) -> NpyHeader:
    """The header of an array of numbers in the order of C, from the first bytes of its file (64 KiB hold any).

    Raises:
        ValueError: No .npy, a damaged header, or records and objects instead of numbers.
    """
    if head[:6] != _MAGIC or len(head) < 12 or head[6] not in (1, 2, 3) or head[7]:
        raise ValueError(f"no .npy, it begins with {head[:8]!r}")
    start = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:start], "little")
    if start + length > min(len(head), _MAX_HEADER_BYTES):
        raise ValueError("the header of the .npy is cut off")
    found = _PLAIN.fullmatch(head[start : start + length].decode("latin-1"))
    if found is None:
        raise ValueError(f"the header of the .npy does not read: {head[start : start + 60]!r}")
    try:
        dtype = np.dtype(found.group(1))
        shape = tuple(int(size) for size in found.group(2).split(",") if size.strip())
    except TypeError as error:
        raise ValueError(f"the .npy has an unknown type ({error})") from error
    if dtype.hasobject:
        raise ValueError("the .npy holds pickled objects")
    return NpyHeader(dtype, shape, start + length)


def open_npy(path: Path) -> np.ndarray:
    """The array of a file, memory-mapped and read-only (an empty one is made, mmap refuses it).

    Raises:
        OSError: The file cannot be read.
        ValueError: As `parse_npy_header`, or the file is shorter or longer than its header says.
    """
    with path.open("rb") as stream:
        header = parse_npy_header(stream.read(_MAX_HEADER_BYTES))
        size = os.fstat(stream.fileno()).st_size
        if size != header.num_bytes:
            raise ValueError(f"it has {size} bytes, its header says {header.num_bytes}")
        if size == header.start:
            return np.zeros(header.shape, header.dtype)
        mapped = np.memmap(stream, header.dtype, "r", header.start, header.shape)
    # A plain view: single elements come three times faster than from np.memmap.
    return np.asarray(mapped)


def array_of(content: bytes) -> np.ndarray:
    """The values of a .npy in memory, read-only.

    Raises:
        ValueError: It is none, or has more or fewer bytes than it says.
    """
    header = parse_npy_header(content)
    if header.num_bytes != len(content):
        raise ValueError(f"a .npy of {len(content)} bytes says it has {header.num_bytes}")
    return np.frombuffer(content, header.dtype, offset=header.start).reshape(header.shape)
