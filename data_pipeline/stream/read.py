"""Random access to the samples of a source: one or two reads at known offsets, checked, decoded.

Stateless: a reader pickles as its source and geometry and opens shards when they are needed, so any worker process
reads any sample. Every read is checked against the crc32 of the index; nothing damaged is passed on.
"""

import json
import os
import zlib
from collections import OrderedDict

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode_image, understanding_view
from data_pipeline.manifest import Source
from data_pipeline.schema import Sample, Segment
from data_pipeline.spec import ImageGeometry
from data_pipeline.tar_scan import BLOCK, parse_header

_MAX_OPEN_SHARDS = 64
_REDO = "copy it again, or delete the directory and run `janus-mega data prepare` once more"


class SampleReader:
    """Reads samples of one source by number."""

    def __init__(self, source: Source, geometry: ImageGeometry) -> None:
        self.source = source
        self.geometry = geometry
        self._token_dtype = np.dtype(source.manifest.token_dtype)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[type["SampleReader"], tuple[Source, ImageGeometry]]:
        return SampleReader, (self.source, self.geometry)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards that are open; reading opens them again."""
        files = self.__dict__.get("_files", {})
        while files:
            os.close(files.popitem()[1])

    def read(self, i: int) -> Sample:
        """Returns sample i, images decoded at the geometry's understanding_size.

        Raises:
            UserError: The shard cannot be read, its bytes do not match the index, or an image does not decode.
        """
        if self.source.kind == "t2i":
            return self._read_drawing(i)
        if self.source.kind == "text":
            shard, _ = self.source.place_of(i)
            ids = self._text_ids(self._checked(i, shard, self._row(i, shard)))
            return Sample(self.source.uid(i), segments=(Segment(ids),))
        return self._read_interleaved(i)

    def _read_drawing(self, i: int) -> Sample:
        shard, _ = self.source.place_of(i)
        images = self.source.manifest.image_tokenizer
        assert images is not None
        image_row = self._pread(shard, self.source.image_ids_offset(i), 2 * images.num_tokens)
        caption_row = self._row(i, shard)
        self._checked(i, shard, image_row, caption_row)
        return Sample(
            self.source.uid(i),
            caption_ids=self._text_ids(caption_row),
            image_ids=np.frombuffer(image_row, "<u2"),
        )

    def _read_interleaved(self, i: int) -> Sample:
        shard, _ = self.source.place_of(i)
        members = self.members(i)
        document = json.loads(bytes(members["doc.json"]))
        ids = self._text_ids(npy_payload(members["tok.npy"]))
        segments: list[Segment] = []
        names: list[str] = []
        start = 0
        for part in document["seq"]:
            if part["t"] == "image":
                segments.append(Segment(image=len(names), has_loss=False))
                names.append(part["name"])
                continue
            segments.append(Segment(ids[start : start + part["n"]], has_loss=part["loss"]))
            start += part["n"]
        images = tuple(self._image(members, name, i, shard) for name in names)
        return Sample(self.source.uid(i), segments=tuple(segments), images=images)

    def _image(self, members: dict[str, memoryview], name: str, i: int, shard: int) -> np.ndarray:
        try:
            return understanding_view(decode_image(bytes(members[name])), self.geometry.understanding_size)
        except (ImageError, KeyError) as error:
            where = f"{self.source.shard_path(shard)}: member {name!r} of sample {self.source.uid(i)}"
            raise UserError(
                f"{where} is no usable picture: {error}; remove or replace the raw picture and run "
                "`janus-mega data prepare` again"
            ) from error

    def members(self, i: int) -> dict[str, memoryview]:
        """The stored members of an interleaved sample by the part of their name after the key.

        Raises:
            UserError: As `read`.
        """
        shard, _ = self.source.place_of(i)
        block = self._checked(i, shard, self._row(i, shard))
        view = memoryview(block)
        members: dict[str, memoryview] = {}
        at = 0
        while at < len(block):
            member = parse_header(view[at : at + BLOCK], at)
            if member is None:
                raise UserError(
                    f"{self.source.shard_path(shard)}: the index points past the last sample; prepare again"
                )
            members[member.name.split(".", 1)[1]] = view[member.data : member.data + member.size]
            at = member.end
        return members

    def _text_ids(self, row: bytes | memoryview) -> np.ndarray:
        return np.frombuffer(row, self._token_dtype).astype(np.int32)

    def _row(self, i: int, shard: int) -> bytes:
        return self._pread(shard, int(self.source.offset[i]), int(self.source.length[i]))

    def _checked(self, i: int, shard: int, *parts: bytes) -> bytes:
        """Returns the last part if the crc32 over all parts is the index's."""
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        if crc != int(self.source.crc[i]):
            raise UserError(
                f"{self.source.shard_path(shard)}: sample {self.source.uid(i)} has crc32 {crc:08x}, the index says "
                f"{int(self.source.crc[i]):08x}: the tar is damaged; {_REDO}"
            )
        return parts[-1]

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard."""
        data = os.pread(self._open(shard), size, offset)
        if len(data) != size:
            raise UserError(
                f"{self.source.shard_path(shard)}: the tar is truncated: {size} bytes wanted at {offset}, {len(data)} "
                f"there; {_REDO}"
            )
        return data

    def _open(self, shard: int) -> int:
        """Descriptor of a shard; the least recently used one is closed when there are many."""
        file = self._files.get(shard)
        if file is not None:
            self._files.move_to_end(shard)
            return file
        path = self.source.shard_path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: the shard cannot be opened ({error.strerror}); copy it again") from error
        if len(self._files) >= _MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = file
        return file


def npy_payload(member: memoryview | bytes) -> memoryview:
    """The array bytes of a .npy member (format 1.0), header skipped.

    Raises:
        ValueError: No .npy.
    """
    view = memoryview(member)
    if bytes(view[:6]) != b"\x93NUMPY" or view[6] != 1:
        raise ValueError("not a .npy of format 1.0")
    return view[10 + int.from_bytes(view[8:10], "little") :]
