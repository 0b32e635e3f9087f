"""JSON arrays of objects, however large: one pass finds where each object begins and ends, then any can be read alone.

The pass decodes object after object in a window that grows only for an object that does not fit. Text is taken as
Latin-1 there: JSON's own characters are ASCII, so the structure is the same and characters count as bytes.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.prepare.importers.pictures import Pictures
from data_pipeline.prepare.importers.record import MAX_RECORD_BYTES, Record, parse_json
from data_pipeline.prepare.importers.shapes import Shapes

_WINDOW_BYTES = 1 << 20
_SPACE = " \t\r\n"


class _Window:
    """A JSON file through a window."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("rb")
        self._text = ""
        self._start = 0
        self._at = 0
        self._decoder = json.JSONDecoder()
        self._more(_WINDOW_BYTES)
        if self._text.startswith("\xef\xbb\xbf"):
            self._at = 3

    def __enter__(self) -> "_Window":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def offset(self) -> int:
        """Byte offset of what comes next."""
        return self._start + self._at

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_WINDOW_BYTES):
                return ""

    def take(self, character: str) -> None:
        """Steps over one character.

        Raises:
            UserError: Another one stands there.
        """
        if self.peek() != character:
            raise self.damaged(f"expected {character!r}, found {self.peek() or 'the end of the file'!r}")
        self._at += 1

    def value(self) -> Any:
        """Decodes the next value; its texts are Latin-1.

        Raises:
            UserError: There is none.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or len(self._text) - self._at > MAX_RECORD_BYTES:
                    raise self.damaged(f"too large or nested too deeply, or {error}") from error
                # Whatever is wrong, it may be that the value goes on behind the window.
                if not self._more(max(_WINDOW_BYTES, len(self._text) - self._at)):
                    raise self.damaged(str(error)) from error
                continue
            if end < len(self._text) or not self._more(_WINDOW_BYTES):
                self._at = end
                return value

    def damaged(self, what: str) -> UserError:
        """What is wrong, and where."""
        return UserError(f"{self._path}: no valid JSON at byte {self.offset}: {what}; write the file again")

    def _more(self, count: int) -> bool:
        """Reads on, and forgets what has been passed; False at the end of the file."""
        content = self._stream.read(count)
        if content:
            self._text = self._text[self._at :] + content.decode("latin-1")
            self._start += self._at
            self._at = 0
        return bool(content)


def iterate_objects(path: Path, member: str = "") -> Iterator[tuple[int, int, dict[str, Any]]]:
    """First byte, end and value (texts as Latin-1) of the objects of an array, one in memory at a time.

    Args:
        path: A file whose value is the array, or an object with the array in it.
        member: Name of the array in the object; "" where the file is the array.

    Raises:
        UserError: No valid JSON, no such array, or something else than objects in it.
    """
    with _Window(path) as window:
        if member:
            _find_array(window, path, member)
        window.take("[")
        while window.peek() != "]":
            start = window.offset
            value = window.value()
            if not isinstance(value, dict):
                raise window.damaged("an element of the array is no object")
            yield start, window.offset, value
            if window.peek() != "]":
                window.take(",")


def array_name(path: Path, names: Sequence[str]) -> str:
    """The first of these names under which a JSON object holds an array; "" if it has none, or is no object.

    Raises:
        UserError: No valid JSON.
    """
    with _Window(path) as window:
        if window.peek() == "{":
            for name in _members(window):
                if name in names and window.peek() == "[":
                    return name
                _skip(window)
    return ""


def text_member(path: Path, name: str) -> str:
    """A text of a JSON object by its name; "" if there is none.

    Raises:
        UserError: No valid JSON.
    """
    with _Window(path) as window:
        for member in _members(window):
            if member == name:
                value = window.value()
                return value if isinstance(value, str) else ""
            _skip(window)
    return ""


def _find_array(window: _Window, path: Path, name: str) -> None:
    """Moves to the value of a member."""
    for member in _members(window):
        if member == name:
            return
        _skip(window)
    raise UserError(f"{path}: the JSON object has no array {name!r}; give the file that has")


def _members(window: _Window) -> Iterator[str]:
    """Names of an object's members; who iterates takes each value before the next name."""
    window.take("{")
    while window.peek() == '"':
        name = str(window.value())
        window.take(":")
        yield name
        if window.peek() != "}":
            window.take(",")


def _skip(window: _Window) -> None:
    """Passes a value, an array an element at a time."""
    if window.peek() != "[":
        window.value()
        return
    window.take("[")
    while window.peek() != "]":
        window.value()
        if window.peek() != "]":
            window.take(",")
    window.take("]")


@dataclass(slots=True)
class Array:
    """One .json whose value is an array of records."""

    path: Path
    name: str
    """What its records are named after."""
    shapes: Shapes
    pictures: Pictures
    _ranges: np.ndarray | None = None
    """uint64 [n, 2]: first byte and end."""

    def files(self) -> list[Path]:
        """See Part."""
        return [self.path]

    def count(self) -> int:
        """See Part."""
        return len(self._find())

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """See Part."""
        with self.path.open("rb") as stream:
            for number, (first, end) in enumerate(self._find()[start:stop].tolist(), start=start):
                stream.seek(first)
                raw = stream.read(end - first)
                place, name = f"{self.path}: element {number}", f"{self.name}:{number}"
                yield Record(place, name, raw, self._parse, self.pictures, self.path.parent)

    def _find(self) -> np.ndarray:
        if self._ranges is None:
            flat = array("Q")
            for start, end, _ in iterate_objects(self.path):
                flat.extend((start, end))
            self._ranges = np.array(flat, np.uint64).reshape(-1, 2)
        return self._ranges

    def _parse(self, raw: bytes) -> dict[str, Any]:
        return self.shapes.canonical(parse_json(raw), self.pictures)
