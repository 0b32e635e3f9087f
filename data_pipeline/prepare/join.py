"""Parts of an index to whole columns, with one part in memory at a time, however many samples there are.

Columns are written aside side by side while the parts pass by once; their hashes are taken on the way.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import sync_and_replace
from data_pipeline.prepare.asides import aside_of


@dataclass(slots=True)
class JoinedIndex:
    """What the manifest says of the index."""

    sha256: dict[str, str] = field(default_factory=dict)
    """Of every file, by its name."""
    totals: dict[str, int] = field(default_factory=dict)
    """Sums over the counting columns."""


def join_parts(
    parts: Sequence[Path], num_samples: Sequence[int], index: Path, columns: dict[str, str], counted: Sequence[str]
) -> JoinedIndex:
    """Writes one .npy a column, and ptr.npy, below `index`.

    Args:
        parts: One .npy a shard: a structured array with the columns.
        num_samples: Samples of each.
        index: Directory to write.
        columns: Dtype of every column.
        counted: Columns to sum.

    Raises:
        FileNotFoundError: A part, or something half-written, is gone.
        UserError: A part is damaged.
    """
    joined = JoinedIndex(totals=dict.fromkeys(counted, 0))
    with ExitStack() as stack:
        files: dict[str, ColumnFile] = {}
        for number, (path, count) in enumerate(zip(parts, num_samples, strict=True)):
            rows = _load(path, count)
            for name, dtype in columns.items():
                column = rows[name].astype(dtype)
                if not number:
                    shape = (sum(num_samples), *column.shape[1:])
                    files[name] = stack.enter_context(ColumnFile(index / f"{name}.npy", column.dtype, shape))
                files[name].append(column)
            for name in counted:
                joined.totals[name] += int(rows[name].sum(dtype=np.int64))
        first = np.cumsum([0, *num_samples], dtype="<i8")
        files["ptr"] = stack.enter_context(ColumnFile(index / "ptr.npy", first.dtype, first.shape))
        files["ptr"].append(first)
        joined.sha256 = {f"{name}.npy": files[name].finish() for name in sorted(files)}
    return joined


def _load(path: Path, count: int) -> np.ndarray:
    try:
        rows = np.load(path, allow_pickle=False)
        if len(rows) != count:
            raise ValueError(f"{len(rows)} samples instead of {count}")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run the same command again") from error
    return rows


class ColumnFile:
    """A .npy that grows until it is finished; a context manager that leaves nothing half-written."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._path = path
        self._aside = aside_of(path)
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = self._aside.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(_Writer(self._write), header)

    def __enter__(self) -> "ColumnFile":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._file.close()
            self._aside.unlink(missing_ok=True)

    def append(self, rows: np.ndarray) -> None:
        """Adds the next rows."""
        self._write(np.ascontiguousarray(rows).tobytes())

    def finish(self) -> str:
        """Renames the file into place; returns its sha256."""
        sync_and_replace(self._file, self._aside, self._path)
        return self._hash.hexdigest()

    def _write(self, content: bytes) -> None:
        self._hash.update(content)
        self._file.write(content)


@dataclass(frozen=True, slots=True)
class _Writer:
    """What numpy writes a header to."""

    write: Callable[[bytes], None]
