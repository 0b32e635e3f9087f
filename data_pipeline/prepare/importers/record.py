"""The record that all formats give, and sources made of one part per file."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.prepare.importers.pictures import Pictures
from data_pipeline.prepare.records import RawRecord, Reject, checked_text

MAX_RECORD_BYTES = 256 * 1024 * 1024
"""Larger lines, JSON objects and text files are refused."""


@dataclass(frozen=True, slots=True)
class Record:
    """What was found at a place; it is parsed when somebody asks, so that skipped records cost nothing."""

    place: str
    """For complaints: file and line, row or key."""
    name: str
    """Its identity if it has no id of its own; the same wherever the input lies."""
    raw: Any
    parse: Callable[[Any], dict[str, Any]]
    """From raw to canonical fields; raises Reject."""
    pictures: Pictures
    home: Path
    """See RawRecord."""

    def __str__(self) -> str:
        return self.place

    def fields(self) -> dict[str, Any]:
        """See RawRecord."""
        return self.parse(self.raw)

    def identity(self, fields: dict[str, Any]) -> str:
        """See RawRecord."""
        given = next((fields[name] for name in ("id", "uid") if fields.get(name) not in (None, "")), None)
        if given is None:
            return self.name
        return str(given) if type(given) is int else checked_text(given, "id")

    def picture(self, name: Any) -> bytes:
        """See RawRecord."""
        return self.pictures.read(checked_text(name, "image"))


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object of a line.

    Raises:
        Reject: Not UTF-8, not JSON, not an object, too large.
    """
    if len(raw) > MAX_RECORD_BYTES:
        raise Reject("too_large", f"the record has more than {MAX_RECORD_BYTES} bytes")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Reject("bad_record", f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise Reject("bad_record", "the line is no JSON object")
    return value


class Part(Protocol):
    """The records of one file (or of one directory of pictures)."""

    path: Path

    def files(self) -> list[Path]:
        """What is read."""
        ...

    def count(self) -> int:
        """Number of records; what it takes to find them is kept."""
        ...

    def read(self, start: int, stop: int) -> Iterator[RawRecord]:
        """Records start to stop - 1 of this part."""
        ...


class Chained:
    """Parts behind one another: a RecordSource."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._starts: list[int] | None = None

    def files(self) -> list[Path]:
        """See RecordSource."""
        return [path for part in self._parts for path in part.files()]

    def count(self) -> int:
        """See RecordSource."""
        return self._first_records()[-1]

    def read(self, start: int, stop: int) -> Iterator[RawRecord]:
        """See RecordSource."""
        starts = self._first_records()
        stop = min(stop, starts[-1])
        number = bisect_right(starts, start) - 1
        while start < stop:
            first, end = starts[number], min(starts[number + 1], stop)
            if start < end:
                yield from self._parts[number].read(start - first, end - first)
                start = end
            number += 1

    def _first_records(self) -> list[int]:
        if self._starts is None:
            self._starts = list(accumulate((part.count() for part in self._parts), initial=0))
        return self._starts
