"""Raw input as records that can be counted and read from anywhere, whatever format it comes in.

A record knows where it stands (file and line, row or key), so every complaint names it. Order is the order given,
directories sorted by name: the n-th record is the same on every machine, and a task that does records 7,000 to 7,999
skips what lies before without reading it. The formats are in `importers/`, one file each.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import UserError
from data_pipeline.prepare.importing import ImportOptions


class Reject(Exception):
    """A record that cannot be used; `reason` is the word it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RawRecord(Protocol):
    """One record of the input; `str()` of it says where it stands."""

    @property
    def home(self) -> Path:
        """What names of pictures are relative to: a directory, or the file that holds them."""
        ...

    def fields(self) -> dict[str, Any]:
        """What it says, in one of the forms that prepare knows.

        `{"text"}`; `{"segments": [{"text", "loss"} | {"image"}, ...]}`;
        `{"question", "answer", "image" | "images", "system"}`; `{"image", "caption" | "captions"}`;
        `{"conversation": [{"role": "system" | "user" | "assistant", "text"}, ...], "images"}`.
        Further keys, and those of a mapping "meta", are facts about it (language, scores, url, license, sha256).

        Raises:
            Reject: It cannot be read.
        """
        ...

    def identity(self, fields: dict[str, Any]) -> str:
        """What it is called: its own id or uid, else where it stands.

        Raises:
            Reject: The id cannot be stored.
        """
        ...

    def picture(self, name: Any) -> bytes:
        """The file of a picture by the name that `fields` gives it, undecoded.

        Raises:
            Reject: No such picture, one that is too large, or a name that leads elsewhere.
        """
        ...


class RecordSource(Protocol):
    """All records of the inputs. It pickles, with what it has learnt about offsets, so workers need not scan again."""

    def files(self) -> list[Path]:
        """The files that hold them, in order; with their sizes they stand for the input in digests."""
        ...

    def count(self) -> int:
        """Number of records.

        Raises:
            UserError: A file is damaged.
        """
        ...

    def read(self, start: int, stop: int) -> Iterator[RawRecord]:
        """Records start to stop - 1; what lies before is skipped by files, row groups and known offsets.

        Raises:
            UserError: A file is damaged.
        """
        ...


def open_records(inputs: Iterable[str | Path], options: ImportOptions | None = None) -> RecordSource:
    """The records of files and directories.

    Args:
        inputs: .jsonl, .json, .parquet, .txt, .md, .tar, or directories of such or of pictures.
        options: How to read them.

    Raises:
        UserError: An input is missing, of no known format, or holds nothing.
    """
    from data_pipeline.prepare.importers.discover import open_inputs  # importers stand on this module

    return open_inputs(inputs, options or ImportOptions())


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


def read_texts(inputs: Iterable[str | Path]) -> Iterator[str]:
    """Every text of every record, whatever its kind: what a text tokenizer learns from.

    Raises:
        UserError: A record is not readable.
    """
    source = open_records(inputs)
    for record in source.read(0, source.count()):
        try:
            yield from _texts_of(record.fields())
        except Reject as error:
            raise UserError(f"{record}: {error}; correct or remove the record") from error


def _texts_of(fields: dict[str, Any]) -> Iterator[str]:
    for name in ("text", "caption", "question", "answer", "system"):
        if name in fields:
            yield text_field(fields, name)
    for caption in fields.get("captions") or ():
        yield checked_text(caption, "captions")
    for name in ("segments", "conversation"):
        for part in fields.get(name) or ():
            if isinstance(part, dict) and "text" in part:
                yield text_field(part, "text")
