"""The table of a checkpoint's tensors (`tensors.json`), and whether it and the files of tensors say the same.

Every byte of a tensor file is vouched for without being read: its header's digest together with the digests of tensors
in this table must give the digest of the file in the manifest. A reader then compares only the tensors that it reads.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from janus_mega.checkpoint.tensor_file import DTYPES, Digests, TensorFile, are_sizes, damaged, tree_digest
from janus_mega.parallel.slices import Box, check_coverage


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor and where it is stored."""

    file: str
    key: str
    box: Box
    digest: bytes | None
    """SHA-256 of its bytes; None in schema 1."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Index:
    """The tensors of one checkpoint."""

    def __init__(self, path: Path, content: bytes, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Parses the table.

        Args:
            path: where it was read, for messages.
            content: its bytes, already compared with the manifest.
            files: files as the manifest lists them.

        Raises:
            UserError: it is not such a table.
        """
        self.path = path
        self._files = files
        self._covered: set[str] = set()
        self.by_file: dict[str, dict[str, tuple[Piece, torch.dtype]]] = {}
        try:
            rows = json.loads(content.decode("utf-8"))
            self.entries = {name: self._entry(row) for name, row in rows.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, f"not a table of tensors ({error})") from None

    def _entry(self, row: Any) -> Entry:
        if not are_sizes(row["shape"]):
            raise ValueError("a shape that is no list of sizes")
        dtype, shape = DTYPES[row["dtype"]], tuple(row["shape"])
        pieces = tuple(self._piece(piece, dtype) for piece in row["pieces"])
        return Entry(dtype, shape, pieces)

    def _piece(self, row: Any, dtype: torch.dtype) -> Piece:
        file, key, sha256 = row["file"], row["key"], row.get("sha256")
        if file not in self._files or not isinstance(key, str):
            raise ValueError(f"a piece in {str(file)[:80]!r}, which the manifest does not list")
        if not are_sizes(row["offset"]) or not are_sizes(row["shape"]) or len(row["offset"]) != len(row["shape"]):
            raise ValueError("a piece whose place is no list of sizes")
        if ("tree_sha256" in self._files[file]) != (sha256 is not None):
            raise ValueError("a piece without the digest that its file needs")
        digest = None if sha256 is None else bytes.fromhex(sha256)
        piece = Piece(file, key, Box(tuple(row["offset"]), tuple(row["shape"])), digest)
        if self.by_file.setdefault(file, {}).setdefault(key, (piece, dtype))[0] is not piece:
            raise ValueError(f"{key[:80]!r} is given twice")
        return piece

    def covered(self, name: str) -> Entry:
        """A tensor whose pieces hold each of its elements once.

        Raises:
            KeyError: there is no such tensor.
            UserError: elements are missing or given twice.
        """
        entry = self.entries[name]
        if name not in self._covered:
            try:
                check_coverage(name, entry.shape, [piece.box for piece in entry.pieces])
            except ValueError as error:
                raise damaged(self.path, str(error)) from None
            self._covered.add(name)
        return entry

    def check_all(self) -> None:
        """Raises UserError unless all tensors are covered and all headers of files agree with the table."""
        for name in self.entries:
            self.covered(name)
        for name, listed in self._files.items():
            if name in self.by_file or "tree_sha256" in listed:
                self.open_file(name, verify="tree_sha256" in listed)

    def open_file(self, name: str, *, verify: bool = True) -> tuple[TensorFile, dict[str, bytes]]:
        """A file of tensors and the digests to compare them with.

        Args:
            name: the file's name in the checkpoint.
            verify: False gives no digests. A file of schema 1 is read from beginning to end for them.

        Raises:
            UserError: it is damaged.
        """
        listed, known = self._files[name], self.by_file.get(name, {})
        file = TensorFile(self.path.parent / name)
        if file.num_bytes != listed["bytes"]:
            raise damaged(file.path, f"{file.num_bytes} bytes, the manifest says {listed['bytes']}")
        if file.places.keys() != known.keys():
            raise damaged(file.path, f"holds other tensors than {self.path.name} says")
        for key, (piece, dtype) in known.items():
            if file.places[key].dtype != dtype or file.places[key].shape != piece.box.shape:
                raise damaged(file.path, f"{key} has another form than {self.path.name} says")
        if not verify:
            return file, {}
        if "sha256" in listed:
            return file, _digests_of_whole(file, listed["sha256"]).tensors
        digests = {key: known[key][0].digest or b"" for key in file.places}
        if tree_digest(file.head, digests.values()) != listed["tree_sha256"]:
            raise damaged(file.path, "its header or a digest of its tensors does not match the manifest's SHA-256")
        return file, digests


def _digests_of_whole(file: TensorFile, sha256: str) -> Digests:
    """Digests of a file's tensors, made while the whole file was compared with its own."""
    whole = hashlib.sha256()
    try:
        digests = file.digests(whole)
    except OSError as error:
        raise damaged(file.path, error) from None
    if whole.hexdigest() != sha256:
        raise damaged(file.path, "bytes do not match the manifest's SHA-256")
    return digests
