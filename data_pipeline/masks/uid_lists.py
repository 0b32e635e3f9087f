"""Lists of uids that other tools write: which samples of a source they name.

    .npy                        DataComp's subset files: pairs of u8 (structured, or [n, 2]), sorted or not
    .txt                        an id a line
    .jsonl, .jsonl.gz, .parquet a record with its id in `id` or `uid`, as datatrove writes those it keeps or removes
    a directory                 every such file in it, by name

Ids of 32 hex digits are uids; others are hashed as prepare hashes them. Files are read in pieces, so a list may be
longer than memory. A text that prepare cut into several documents is named by the id of the whole.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.manifest import Source
from data_pipeline.masks.lookup import UidIndex
from data_pipeline.uid import uid_text, uid_words, words_text

ID_FIELDS = ("uid", "id")
"""Where a record's id is looked for, in this order."""

_PIECE = 500_000
_MAX_LINE_BYTES = 64 * 1024 * 1024
_SUFFIXES = (".npy", ".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


def listed_samples(source: Source, paths: Iterable[str | Path]) -> tuple[np.ndarray, int, int]:
    """Finds the samples that lists name.

    Returns:
        (bool [N] named by a list, how many of the listed ids were found, how many are listed).

    Raises:
        UserError: A list cannot be read or holds no ids, or not one of its ids is in the source.
    """
    index = UidIndex(source.uids)
    named = np.zeros(source.num_samples, np.bool_)
    num_found = num_listed = 0
    example = ""
    for path in map(Path, paths):
        for file in _files_of(path):
            for words, identities in _read_list(file):
                example = example or (identities[0] if identities is not None else words_text(words[0]))
                queries, samples = index.find(words)
                named[samples] = True
                hit = np.unique(queries)
                num_found += len(hit)
                num_listed += len(words)
                if source.kind == "text":
                    _name_pieces(index, named, words[hit], None if identities is None else [identities[i] for i in hit])
    if not num_listed:
        raise UserError(f"{', '.join(map(str, paths))}: not one id is listed; give the list that you meant")
    if not num_found:
        raise UserError(
            f"{', '.join(map(str, paths))}: none of the {num_listed} listed ids is in {source.path}; the list has ids "
            f"such as {example[:80]!r} (uid {uid_text(example)}), the source uids such as {source.uid(0)}: give a list "
            "made from this data"
        )
    return named, num_found, num_listed


def _name_pieces(index: UidIndex, named: np.ndarray, words: np.ndarray, identities: list[str] | None) -> None:
    """Also names the further documents that long texts were cut into: prepare calls them `<id>#1`, `<id>#2` ..."""
    wholes = identities if identities is not None else [words_text(pair) for pair in words]
    number = 1
    while wholes:
        queries, samples = index.find(uid_words([uid_text(f"{whole}#{number}") for whole in wholes]))
        named[samples] = True
        wholes = [wholes[i] for i in np.unique(queries)]
        number += 1


def _files_of(path: Path) -> list[Path]:
    """The list itself, or the lists of a directory."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
        if not files:
            raise UserError(f"{path}: no list of uids in this directory; lists end in {', '.join(_SUFFIXES)}")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory; check the path of the list of uids")
    if not path.name.endswith(_SUFFIXES):
        raise UserError(f"{path}: lists of uids end in {', '.join(_SUFFIXES)}; convert or rename it")
    return [path]


def _read_list(path: Path) -> Iterator[tuple[np.ndarray, list[str] | None]]:
    """Yields (uint64 [m, 2], the ids as they are written, if they are) in pieces that are not empty."""
    if path.suffix == ".npy":
        for words in _read_npy(path):
            yield words, None
        return
    ids = _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
    while piece := list(islice(ids, _PIECE)):
        yield uid_words([uid_text(identity) for identity in piece]), piece


def _read_npy(path: Path) -> Iterator[np.ndarray]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: no readable .npy ({error}); write pairs of u8 without pickle") from error
    columns: list[np.ndarray] = []
    if array.ndim == 1 and array.dtype.names is not None:
        columns = [array[name] for name in array.dtype.names]
    elif array.ndim == 2:
        columns = [array[:, number] for number in range(min(array.shape[1], 3))]
    if len(columns) != 2 or any(column.dtype.kind != "u" or column.itemsize != 8 for column in columns):
        raise UserError(
            f"{path}: uids are pairs of u8 (structured, or [n, 2]), found {array.dtype} {list(array.shape)}; write it "
            "as DataComp does"
        )
    for start in range(0, len(array), _PIECE):
        yield np.stack([column[start : start + _PIECE].astype("<u8") for column in columns], axis=1)


def _read_lines(path: Path) -> Iterator[str]:
    """The ids of a text file or of JSON lines."""
    is_json = not path.name.endswith(".txt")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            while line := stream.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise UserError(f"{path}:{number}: a line of more than {_MAX_LINE_BYTES} bytes; give a list of ids")
                text = line.decode("utf-8").strip()
                if text:
                    yield _id_of(json.loads(text), f"{path}:{number}") if is_json else text
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}:{number}: the list of uids cannot be read ({error}); correct it") from error


def _read_parquet(path: Path) -> Iterator[str]:
    """The ids of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        field = next((name for name in ID_FIELDS if name in file.schema_arrow.names), None)
        if field is None:
            raise UserError(
                f"{path}: no column {' or '.join(ID_FIELDS)}, there are {', '.join(file.schema_arrow.names)}; add one"
            )
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                yield _id_of({field: value}, str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: no readable Parquet file ({error}); write it again") from error


def _id_of(record: Any, where: str) -> str:
    """The id that a record states."""
    value = next((record[name] for name in ID_FIELDS if name in record), None) if isinstance(record, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: a record of a list needs its id, a text, in {' or '.join(ID_FIELDS)}; add it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the id holds broken Unicode ({error.reason}); correct it") from error
    return value
