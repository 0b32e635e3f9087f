"""Writes beside training: a disk that is full or broken costs what was to be written, not the run.

Only OSError is borne, which is what disks and networks raise; every other error is a defect and goes on.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class Lenient:
    """Writes of one kind. The first that fails is told, those after it are tried and counted."""

    def __init__(self, what: str, *, catches_up: bool = False) -> None:
        """`what` is written, for the log; `catches_up` says that a write holds what those before it did not."""
        self._what = what
        self._catches_up = catches_up
        self._num_missing = 0

    def attempt(self, write: Callable[[], object]) -> bool:
        """Whether it could be written."""
        try:
            write()
        except OSError as error:
            if not self._num_missing:
                _log.warning(
                    "%s: could not be written (%s); training goes on without, and tries again with the next: make room",
                    self._what,
                    error,
                )
            self._num_missing += 1
            return False
        if self._num_missing:
            missing = "nothing is missing" if self._catches_up else f"{self._num_missing} writes before are missing"
            _log.warning("%s: is written again; %s", self._what, missing)
            self._num_missing = 0
        return True


class LenientLines:
    """A file of JSON lines that is appended to; every line in it but the last is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writes = Lenient(str(path))
        self._is_whole = False  # a process that was killed may have left half a line

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends a line for each row, or tells that it could not."""
        content = "".join(json.dumps(row) + "\n" for row in rows)
        self._writes.attempt(lambda: self._append(content))

    def _append(self, content: str) -> None:
        if not self._is_whole:
            _cut_torn_line(self._path)
        self._is_whole = False
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(content)
        except OSError:
            with suppress(OSError):  # it is tried again before the next line
                _cut_torn_line(self._path)
            raise
        self._is_whole = True


def write_whole(path: Path, content: str) -> None:
    """Writes a text file that is complete or as it was before.

    Raises:
        OSError: it could not be written.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        aside.write_text(content, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _cut_torn_line(path: Path) -> None:
    """Removes what follows the last newline: the line after it would be unreadable too."""
    if not path.is_file():
        return
    with path.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        if not size:
            return
        stream.seek(size - 1)
        if stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
