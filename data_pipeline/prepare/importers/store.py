"""Pictures of records that only name them: by file name or URL, in directories, tars and maps that the user has.

A directory holds a picture under its name, or under the sha256 of its URL with any usual suffix. A tar of img2dataset
holds it under member name, key and the URL of its .json. A map is a .jsonl of `{"url": ..., "file": ...}`, files
relative to it. Tars and maps become one sorted table of 128-bit hashes of names, 40 bytes a name.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.pairs import PICTURE_EXTENSIONS, Pair, parse_facts, scan_pairs
from data_pipeline.prepare.importers.pictures import Beside, Pictures, read_range
from data_pipeline.prepare.records import Reject

_IN_MAP = (1 << 64) - 1
"""Offset that stands for a whole file of a map."""


@dataclass(slots=True)
class Store:
    """All of it as Pictures; looks beside the record first."""

    beside: Beside
    directories: tuple[Beside, ...]
    table: "NameTable"

    def read(self, name: str) -> bytes:
        """See Pictures."""
        if name.startswith("pipe:"):
            raise Reject("bad_path", f"image {name!r} is a shell command, which is never run")
        content = self.table.read(name)
        if content is not None:
            return content
        for directory in (self.beside, *self.directories):
            for candidate in _candidates(name):
                if directory.has(candidate):
                    return directory.read(candidate)
        if "://" in name:
            raise Reject("missing_image", f"image {name!r} is neither in the directories nor in the tars of --images")
        return self.beside.read(name)  # says why not

    def has(self, name: str) -> bool:
        """See Pictures."""
        places = (self.beside, *self.directories)
        return self.table.has(name) or any(d.has(candidate) for d in places for candidate in _candidates(name))


class NameTable:
    """Where pictures lie by the hash of their names; the first of equal names counts."""

    def __init__(self, tars: Iterable[Path], maps: Iterable[Path]) -> None:
        """Scans tars and maps.

        Raises:
            UserError: One is damaged.
        """
        self._files: list[Path] = []
        rows = array("Q")
        for path in tars:
            for name, offset, size in _names_in_tar(path):
                rows.extend((*_hash(name), len(self._files), offset, size))
            self._files.append(path)
        for path in maps:
            for url, file in _lines_of_map(path):
                rows.extend((*_hash(url), len(self._files), _IN_MAP, 0))
                self._files.append(file)
        table = np.array(rows, np.uint64).reshape(-1, 5)
        self._table = table[np.lexsort((table[:, 1], table[:, 0]))]

    def has(self, name: str) -> bool:
        """Whether the name is known."""
        return self._find(name) is not None

    def read(self, name: str) -> bytes | None:
        """The picture of a name, if it is known.

        Raises:
            Reject: Its file cannot be read.
        """
        row = self._find(name)
        if row is None:
            return None
        path, offset, size = self._files[row[2]], row[3], row[4]
        if offset != _IN_MAP:
            return read_range(path, offset, size, name)
        try:
            return read_range(path, 0, path.stat().st_size, name)
        except OSError as error:
            raise Reject("missing_image", f"image {name!r} cannot be read ({path}: {error.strerror})") from error

    def _find(self, name: str) -> list[int] | None:
        first, second = _hash(name)
        at = int(np.searchsorted(self._table[:, 0], np.uint64(first)))
        while at < len(self._table) and int(self._table[at, 0]) == first:
            if int(self._table[at, 1]) == second:
                return [int(value) for value in self._table[at]]
            at += 1
        return None


def open_store(images: Iterable[Path]) -> tuple[tuple[Beside, ...], NameTable]:
    """What `--images` names.

    Raises:
        UserError: Something that is neither a directory, a tar nor a map.
    """
    directories: list[Beside] = []
    tars: list[Path] = []
    maps: list[Path] = []
    for path in images:
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
            tars += found
            directories += [] if found else [Beside(path)]
        elif path.is_file() and path.suffix in (".tar", ".jsonl"):
            (tars if path.suffix == ".tar" else maps).append(path)
        else:
            raise UserError(
                f"{path}: pictures are looked for in directories, .tar files and .jsonl maps of url and file; "
                "check the path"
            )
    return tuple(directories), NameTable(tars, maps)


def pictures_beside(directory: Path, store: tuple[tuple[Beside, ...], NameTable] | None) -> Pictures:
    """Pictures beside a file, and those of the store if there is one."""
    return Beside(directory) if store is None else Store(Beside(directory), *store)


def _candidates(name: str) -> list[str]:
    if "://" not in name:
        return [name]
    digest = hashlib.sha256(name.encode()).hexdigest()
    return [f"{digest}.{extension}" for extension in PICTURE_EXTENSIONS]


def _names_in_tar(path: Path) -> Iterator[tuple[str, int, int]]:
    """Every name of every picture of a tar, with offset and size."""
    with path.open("rb") as stream:
        for pair in scan_pairs(path):
            if pair.picture is None:
                continue
            place = (pair.picture.data, pair.picture.size)
            name = pair.picture.name
            names = (name, name.rpartition("/")[2], pair.key, *_url(pair, stream.fileno()))
            for name in dict.fromkeys(names):
                yield name, *place


def _url(pair: Pair, descriptor: int) -> list[str]:
    if pair.facts is None:
        return []
    try:
        facts = parse_facts(os.pread(descriptor, pair.facts.size, pair.facts.data))
    except ValueError:
        return []
    return [facts["url"]] if isinstance(facts.get("url"), str) else []


def _lines_of_map(path: Path) -> Iterator[tuple[str, Path]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                entry = json.loads(line)
                url, file = entry["url"], entry["file"]
                if not isinstance(url, str) or not isinstance(file, str):
                    raise TypeError("they must be texts")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{path}:{number}: a line of a map must have 'url' and 'file' ({error!r})") from error
            yield url, path.parent / file


def _hash(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
