"""Writes one shard and its part of the index: a tar through webdataset's writer, then a header scan for the offsets.

Tars are byte-reproducible (ustar, times 0). The writer only notes which bytes of which member belong to which sample;
where they ended up is read back from the finished tar, so index and tar cannot disagree.
"""

import io
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from data_pipeline.files import sync_and_replace
from data_pipeline.manifest import DRAWING_COLUMNS, SAMPLE_COLUMNS
from data_pipeline.prepare.asides import aside_of
from data_pipeline.prepare.meta import Meta, meta_member
from data_pipeline.tar_scan import Member, scan_tar
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.uid import uid_words

ROW_DTYPE = np.dtype([*SAMPLE_COLUMNS.items(), ("uid", "<u8", (2,)), *DRAWING_COLUMNS.items()])
"""One sample of a shard's part of the index; the last columns are for t2i alone."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One sample: a byte range within a member, or (member "") the whole run of members of a key."""

    key: str
    member: str
    start: int
    size: int
    counts: tuple[int, int, int]
    crc: int
    uid: str
    image: tuple[int, int] | None = None
    """Of a drawing: first byte of its ids in vq.npy, number of its caption."""


@dataclass(frozen=True, slots=True)
class ImageIds:
    """The ids that a t2i sample draws, as they lie in its record's vq.npy."""

    content: bytes
    start: int
    """First byte of them in the array."""
    caption_number: int
    """Number of this sample's caption among those of the image."""


class ShardWriter:
    """Receives the samples of one shard in order; `finish` makes the tar and index real."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rejects: Counter[str] = Counter()
        """Records left out, by reason."""
        self.uses_template = False
        """Whether a sample was rendered with the dialogue template."""
        self.num_text_tokens = 0
        """Text ids so far."""
        self.num_images = 0
        """Pictures so far, each once however many captions it has."""
        self.metas: list[Meta] = []
        """What is known of each sample besides."""
        self._aside = aside_of(path)
        self._stream = self._aside.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0, compress=False, user="", group="")
        self._rows: list[_Row] = []

    def add_sample(
        self, uid: str, members: dict[str, bytes], num_text_tokens: int, num_images: int, meta: Meta | None = None
    ) -> None:
        """Adds one sample that is a WebDataset sample of its own; `meta` goes into the index."""
        key = f"{self.path.stem}{self.num_samples:06d}"
        self._tar.write({"__key__": key, **members})
        self._rows.append(_Row(key, "", 0, 0, (num_text_tokens, num_images, 0), 0, uid))
        self.num_text_tokens += num_text_tokens
        self.num_images += num_images
        self.metas.append(meta or {})

    def add_record(
        self,
        uids: list[str],
        members: dict[str, bytes],
        ids: "FlatIds",
        images: "list[ImageIds] | None" = None,
        metas: Sequence[Meta] = (),
    ) -> None:
        """Adds a block record: many samples whose text ids lie in tok.npy and whose image ids lie in vq.npy.

        Args:
            uids: Identities of the samples.
            members: Further members by extension; vq.npy if there are images.
            ids: Text ids of the samples.
            images: Where each sample's image ids lie.
            metas: What is known of each sample: into the index, and as meta.json into the record.
        """
        key = f"b{self.path.stem}{self.num_samples:06d}"
        words = npy_bytes(uid_words(uids))
        members = {**members, "uid.npy": words, "tok.npy": npy_bytes(ids.flat()), "off.npy": npy_bytes(ids.ends())}
        if any(metas):
            members["meta.json"] = meta_member(metas)
        self._tar.write({"__key__": key, **members})
        self.metas += list(metas) or [{}] * len(uids)
        start = 0
        for number, (uid, row) in enumerate(zip(uids, ids.rows, strict=True)):
            content = row.tobytes()
            image = images[number] if images else None
            crc = zlib.crc32(content, zlib.crc32(image.content) if image else 0)
            counts = (len(row), 0, int(image is not None))
            place = (image.start, image.caption_number) if image else None
            self._rows.append(_Row(key, f"{key}.tok.npy", start, len(content), counts, crc, uid, place))
            start += len(content)
            self.num_text_tokens += len(row)
            self.num_images += int(image is not None and image.caption_number == 0)

    @property
    def num_samples(self) -> int:
        """Samples so far."""
        return len(self._rows)

    def finish(self) -> np.ndarray:
        """Renames the tar into place, if there is a sample; returns its index rows, ROW_DTYPE [samples]."""
        self._tar.close()
        if not self._rows:
            self.abandon()
            return np.empty(0, ROW_DTYPE)
        self._stream.flush()
        members = list(scan_tar(self._aside))
        by_name = {member.name: member for member in members}
        with self._aside.open("rb") as tar:
            first_of_key = _runs(members)
            rows = [self._index_row(row, by_name, first_of_key, tar) for row in self._rows]
        sync_and_replace(self._stream, self._aside, self.path)
        table = np.array(rows, ROW_DTYPE)
        table["uid"] = uid_words([row.uid for row in self._rows])
        return table

    def abandon(self) -> None:
        """Drops what was written, unless it has been finished."""
        if not self._stream.closed:
            self._tar.close()
            self._stream.close()
        self._aside.unlink(missing_ok=True)

    def _index_row(
        self, row: _Row, by_name: dict[str, Member], runs: dict[str, tuple[int, int]], tar: io.BufferedReader
    ) -> tuple[Any, ...]:
        """One entry of ROW_DTYPE; the uid is filled in later for all."""
        if not row.member:
            start, end = runs[row.key]
            tar.seek(start)
            return start, end - start, *row.counts, zlib.crc32(tar.read(end - start)), (0, 0), 0, 0
        member = by_name[row.member]
        offset = member.data + _npy_header_size(tar, member) + row.start
        if row.image is None:
            return offset, row.size, *row.counts, row.crc, (0, 0), 0, 0
        member = by_name[f"{row.key}.vq.npy"]
        image_start, caption_number = row.image
        image_offset = member.data + _npy_header_size(tar, member) + image_start
        return offset, row.size, *row.counts, row.crc, (0, 0), image_offset, caption_number


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
