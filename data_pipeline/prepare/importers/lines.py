"""JSON lines and plain text files."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.prepare.importers.pictures import Beside, Pictures
from data_pipeline.prepare.importers.record import MAX_RECORD_BYTES, Record, parse_json
from data_pipeline.prepare.importers.shapes import Shapes
from data_pipeline.prepare.records import Reject

_MARK_EVERY = 4_096
"""Records between two remembered offsets."""


@dataclass(slots=True)
class Lines:
    """A .jsonl, one record a line; blank lines are none."""

    path: Path
    name: str
    """What its records are named after."""
    shapes: Shapes
    pictures: Pictures
    _marks: list[tuple[int, int, int]] = field(default_factory=list)
    """Record, line and byte offset, every so many records."""
    _count: int = -1

    def files(self) -> list[Path]:
        """See Part."""
        return [self.path]

    def count(self) -> int:
        """See Part."""
        if self._count < 0:
            marks, number, offset = [(0, 0, 0)], 0, 0
            with self.path.open("rb") as stream:
                for at, line in enumerate(stream):
                    if not line.isspace():
                        if number - marks[-1][0] == _MARK_EVERY:
                            marks.append((number, at, offset))
                        number += 1
                    offset += len(line)
            self._marks, self._count = marks, number
        return self._count

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """See Part."""
        self.count()
        home = self.path.parent
        number, at, offset = self._marks[bisect_right(self._marks, (start, 1 << 62)) - 1]
        with self.path.open("rb") as stream:
            stream.seek(offset)
            for line_number, line in enumerate(stream, start=at + 1):
                if number >= stop:
                    return
                if line.isspace():
                    continue
                if number >= start:
                    place = f"{self.path}:{line_number}"
                    yield Record(place, f"{self.name}:{line_number}", line, self._parse, self.pictures, home)
                number += 1

    def _parse(self, raw: bytes) -> dict[str, Any]:
        return self.shapes.canonical(parse_json(raw), self.pictures)


@dataclass(slots=True)
class WholeFile:
    """A plain text file, one document."""

    path: Path
    name: str
    """What its record is named after."""

    def files(self) -> list[Path]:
        """See Part."""
        return [self.path]

    def count(self) -> int:
        """See Part."""
        return 1

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """See Part."""
        if start > 0 or stop < 1:
            return
        if self.path.stat().st_size > MAX_RECORD_BYTES:
            raise UserError(
                f"{self.path}: a plain text file is one document of at most {MAX_RECORD_BYTES} bytes; split it into "
                ".jsonl"
            )
        home = self.path.parent
        yield Record(str(self.path), f"{self.name}:0", self.path.read_bytes(), _text, Beside(home), home)


def _text(raw: bytes) -> dict[str, Any]:
    try:
        return {"text": raw.decode("utf-8")}
    except ValueError as error:
        raise Reject("bad_record", f"not valid UTF-8 ({error})") from error
