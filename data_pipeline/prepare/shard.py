"""Writes one shard and its part of the index: a tar through webdataset's writer, then a header scan for the offsets.

Tars are byte-reproducible (ustar, times 0). The writer only notes which bytes of which member belong to which sample;
where they ended up is read back from the finished tar, so index and tar cannot disagree.
"""

import hashlib
import io
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from data_pipeline.manifest import SAMPLE_COLUMNS
from data_pipeline.tar_scan import Member, scan_tar
from data_pipeline.text.interface import TextTokenizer

ROW_DTYPE = np.dtype(list(SAMPLE_COLUMNS.items()))
"""One sample of a shard's part of the index."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One sample: a byte range within a member, or (member "") the whole run of members of a key."""

    key: str
    member: str
    start: int
    size: int
    counts: tuple[int, int, int]
    crc: int


class ShardWriter:
    """Receives the samples of one shard in order; `finish` makes the tar and index real."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rejects: Counter[str] = Counter()
        """Records left out, by reason."""
        self.uses_template = False
        """Whether a sample was rendered with the dialogue template."""
        self._aside = path.with_name(path.name + ".tmp")
        self._stream = self._aside.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0, compress=False, user="", group="")
        self._rows: list[_Row] = []
        self._image_members: list[str] = []

    def add_sample(self, key: str, members: dict[str, bytes], num_text_tokens: int, num_images: int) -> None:
        """Adds one sample that is a WebDataset sample of its own."""
        self._tar.write({"__key__": key, **members})
        self._rows.append(_Row(key, "", 0, 0, (num_text_tokens, num_images, 0), 0))

    def add_record(self, key: str, members: dict[str, bytes], ids: "FlatIds", image_rows: list[bytes]) -> None:
        """Adds a block record: many samples whose text ids lie in tok.npy and whose image ids lie in vq.npy.

        Args:
            key: WebDataset key.
            members: Further members by extension.
            ids: Text ids of the samples.
            image_rows: Bytes of each sample's image ids, or nothing.
        """
        members = {**members, "tok.npy": npy_bytes(ids.flat()), "off.npy": npy_bytes(ids.ends())}
        self._tar.write({"__key__": key, **members})
        start = 0
        for number, row in enumerate(ids.rows):
            content = row.tobytes()
            crc = zlib.crc32(content, zlib.crc32(image_rows[number]) if image_rows else 0)
            counts = (len(row), 0, int(bool(image_rows)))
            self._rows.append(_Row(key, f"{key}.tok.npy", start, len(content), counts, crc))
            start += len(content)
        if image_rows:
            self._image_members.append(f"{key}.vq.npy")

    def sample_key(self) -> str:
        """WebDataset key of the next sample: shard and row."""
        return f"{self.path.stem}{self.num_samples:06d}"

    def record_key(self) -> str:
        """WebDataset key of the next block record: shard and its first row."""
        return f"b{self.path.stem}{self.num_samples:06d}"

    @property
    def num_samples(self) -> int:
        """Samples so far."""
        return len(self._rows)

    def finish(self) -> tuple[np.ndarray, list[int]]:
        """Renames the tar into place; returns its index rows (ROW_DTYPE) and the offsets of image ids per record."""
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        members = list(scan_tar(self._aside))
        by_name = {member.name: member for member in members}
        with self._aside.open("rb") as tar:
            first_of_key = _runs(members)
            rows = [self._index_row(row, by_name, first_of_key, tar) for row in self._rows]
            images = [by_name[name].data + _npy_header_size(tar, by_name[name]) for name in self._image_members]
        self._aside.replace(self.path)
        return np.array(rows, ROW_DTYPE), images

    def abandon(self) -> None:
        """Drops what was written, unless it has been finished."""
        if not self._stream.closed:
            self._tar.close()
            self._stream.close()
        self._aside.unlink(missing_ok=True)

    def _index_row(
        self, row: _Row, by_name: dict[str, Member], runs: dict[str, tuple[int, int]], tar: io.BufferedReader
    ) -> tuple[int, int, int, int, int, int]:
        if row.member:
            member = by_name[row.member]
            offset = member.data + _npy_header_size(tar, member) + row.start
            return offset, row.size, *row.counts, row.crc
        start, end = runs[row.key]
        tar.seek(start)
        return start, end - start, *row.counts, zlib.crc32(tar.read(end - start))


class FlatIds:
    """Text ids of several samples, to be stored behind one another."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.rows: list[np.ndarray] = []

    def append(self, ids: list[int]) -> None:
        """Adds one sample's ids."""
        self.rows.append(np.array(ids, self.dtype))

    def flat(self) -> np.ndarray:
        """All ids."""
        return np.concatenate([np.empty(0, self.dtype), *self.rows])

    def ends(self) -> np.ndarray:
        """u4: where each sample's ids end."""
        return np.cumsum([len(row) for row in self.rows], dtype="<u4")


def token_dtype(tokenizer: TextTokenizer) -> str:
    """Numpy dtype that holds every id of a tokenizer."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def identity_hashes(names: list[str]) -> np.ndarray:
    """u8 [n, 2]: 128 bits of the sha256 of each record's name, by which shards can be joined."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:16] for name in names)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file of an array, format 1.0 (its header is a multiple of 64 bytes)."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _npy_header_size(tar: io.BufferedReader, member: Member) -> int:
    tar.seek(member.data + 8)
    return 10 + int.from_bytes(tar.read(2), "little")


def _runs(members: list[Member]) -> dict[str, tuple[int, int]]:
    """Byte range of each key's run of members, headers included."""
    runs: dict[str, tuple[int, int]] = {}
    for member in members:
        key = member.name.split(".", 1)[0]
        start = runs[key][0] if key in runs else member.header
        runs[key] = (start, member.end)
    return runs
