"""Raw input as a stream of records: JSON lines, plain text files, directories of both.

A record knows where it stands (file and line), so every complaint names it. Order is the order given, directories
sorted by name: the n-th record is the same on every machine.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import UserError

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Larger picture files and text files are refused."""


_DOCUMENT_SUFFIXES = (".txt", ".md")
_SUFFIXES = (".jsonl", *_DOCUMENT_SUFFIXES)


class Reject(Exception):
    """A record that cannot be used; `reason` is the word it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One line of a .jsonl, or one plain text file."""

    file: Path
    line: int
    """1-based; 0 for a whole file."""
    content: bytes

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else str(self.file)

    def identity(self, fields: dict[str, Any]) -> str:
        """What the record is called: its own id, else where it stands.

        Raises:
            Reject: The id cannot be stored.
        """
        given = fields.get("id")
        return checked_text(given, "id") if given else f"{self.file.name}:{self.line}"

    def fields(self) -> dict[str, Any]:
        """The JSON object of the line, or {"text": ...} of a text file.

        Raises:
            Reject: Not UTF-8, not JSON, not an object.
        """
        try:
            text = self.content.decode("utf-8")
            value = json.loads(text) if self.line else {"text": text}
        except (ValueError, RecursionError) as error:
            raise Reject("bad_record", f"not valid {'JSON' if self.line else 'UTF-8'} ({error})") from error
        if not isinstance(value, dict):
            raise Reject("bad_record", "the line is no JSON object")
        return value


def text_field(fields: dict[str, Any], name: str) -> str:
    """A text of a record.

    Raises:
        Reject: Missing, no text, or not encodable (lone surrogates).
    """
    return checked_text(fields.get(name), name)


def checked_text(value: Any, name: str) -> str:
    """The value, if it is a text that can be stored.

    Raises:
        Reject: It is not.
    """
    if not isinstance(value, str):
        raise Reject("bad_record", f"{name!r} must be a text, found {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Reject("bad_record", f"{name!r} holds broken Unicode ({error.reason})") from error
    return value


def read_picture(record: RawRecord, name: Any) -> bytes:
    """Bytes of a picture named relative to the record's file.

    Raises:
        Reject: The name leaves the directory, or the file is missing or too large.
    """
    name = checked_text(name, "image")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise Reject("bad_path", f"image {name!r} must be a path below {record.file.parent}")
    path = record.file.parent / relative
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Reject("too_large", f"image {name!r} has more than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise Reject("missing_image", f"image {name!r} cannot be read ({error.strerror})") from error


def input_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The .jsonl, .txt and .md files of the inputs; directories are searched, sorted by path.

    Raises:
        UserError: An input is missing, a directory holds none, or a file has another suffix.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = sorted(path for path in given.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
            if not found:
                raise UserError(
                    f"{given}: no .jsonl, .txt or .md file below this directory; give files or another directory"
                )
            files += found
        elif not given.is_file():
            raise UserError(f"{given}: no such file or directory; check the path of the raw input")
        elif given.suffix not in _SUFFIXES:
            raise UserError(
                f"{given}: inputs are .jsonl (one record a line) or .txt and .md (one document a file); rename it"
            )
        else:
            files.append(given)
    return files


def read_records(files: Sequence[Path]) -> Iterator[RawRecord]:
    """Every record of the files in order; blank lines are no records.

    Raises:
        UserError: A text file is too large for one document.
    """
    for path in files:
        if path.suffix in _DOCUMENT_SUFFIXES:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UserError(
                    f"{path}: a plain text file is one document of at most {MAX_FILE_BYTES} bytes; split it into .jsonl"
                )
            yield RawRecord(path, 0, path.read_bytes())
            continue
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield RawRecord(path, number, line)


def count_records(files: Sequence[Path]) -> int:
    """Number of records that `read_records` yields."""
    total = 0
    for path in files:
        if path.suffix in _DOCUMENT_SUFFIXES:
            total += 1
            continue
        with path.open("rb") as stream:
            total += sum(not line.isspace() for line in stream)
    return total


def read_texts(inputs: Iterable[str | Path]) -> Iterator[str]:
    """Every text of every record, whatever its kind: what a text tokenizer learns from.

    Raises:
        UserError: A record is not readable.
    """
    for record in read_records(input_files(inputs)):
        try:
            fields = record.fields()
            for name in ("text", "caption", "question", "answer", "system"):
                if name in fields:
                    yield text_field(fields, name)
            for caption in fields.get("captions") or ():
                yield checked_text(caption, "captions")
            for segment in fields.get("segments") or ():
                if isinstance(segment, dict) and "text" in segment:
                    yield text_field(segment, "text")
        except Reject as error:
            raise UserError(f"{record}: {error}; correct or remove the record") from error
