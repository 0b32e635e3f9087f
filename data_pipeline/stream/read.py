"""Random access to the samples of a source: one or two reads at known offsets, checked, decoded.

Stateless: a reader pickles without its open shards and opens them when they are needed, so any worker process reads any
sample. Every read is checked against the crc32 of the index; nothing damaged is passed on. This is the plain
way, one `Sample` at a time; training rows of text and drawings take the short one (`row_builder`).
"""

import json
import zlib

import numpy as np

from data_pipeline.dialogue import pair_text
from data_pipeline.errors import BrokenSample
from data_pipeline.images import ImageError, decode_image, understanding_view
from data_pipeline.manifest import Source
from data_pipeline.pairs import read_pair, split_name
from data_pipeline.schema import Sample, Segment
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.shard_files import ShardFiles
from data_pipeline.tar_scan import scan_stretch
from data_pipeline.text.interface import TextTokenizer

_REDO = "copy it again, or delete the directory and run `janus-mega data prepare` once more"


class SampleReader:
    """Reads samples of one source by number."""

    def __init__(self, source: Source, geometry: ImageGeometry, tokenizer: TextTokenizer | None = None) -> None:
        """Opens nothing yet; captions of foreign tars (layout pairs) need the `tokenizer`, other sources do not."""
        self.source = source
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.files = ShardFiles(source)
        self._token_dtype = np.dtype(source.manifest.token_dtype)

    def close(self) -> None:
        """Closes the shards that are open; reading opens them again."""
        self.files.close()

    def read(self, i: int, variant: int = 0) -> Sample:
        """Returns sample i, images decoded at the geometry's understanding_size.

        Args:
            i: Number of the sample.
            variant: t2i: which of the stored crops.

        Raises:
            BrokenSample: Its bytes are missing or do not match the index, or an image does not decode.
            UserError: The shard cannot be read at all.
        """
        shard, _ = self.source.place_of(i)
        if self.source.kind == "t2i":
            return self._read_drawing(i, shard, variant)
        if self.source.kind == "text":
            ids = self._text_ids(self._checked(i, shard, self._row(i, shard)))
            return Sample(self.source.uid(i), segments=(Segment(ids),))
        if self.source.manifest.layout == "pairs":
            return self._read_pair(i, shard)
        return self._read_interleaved(i)

    def _read_drawing(self, i: int, shard: int, variant: int) -> Sample:
        images = self.source.manifest.image_tokenizer
        assert images is not None
        size = 2 * images.num_tokens
        image_rows = self._part(i, shard, self.source.image_ids_offset(i), size * images.num_variants)
        caption_row = self._row(i, shard)
        self._checked(i, shard, image_rows, caption_row)
        return Sample(
            self.source.uid(i),
            caption_ids=self._text_ids(caption_row),
            image_ids=np.frombuffer(image_rows, "<u2", images.num_tokens, variant * size),
        )

    def _read_pair(self, i: int, shard: int) -> Sample:
        """A picture with its caption, from somebody else's tar."""
        if self.tokenizer is None:
            raise ValueError(f"{self.source.path}: captions of foreign tars are tokenized when read: give a tokenizer")
        stretch = self._checked(i, shard, self._row(i, shard))
        try:
            pair = read_pair(stretch)
            picture = decode_image(bytes(pair.picture))
        except ImageError as error:
            raise self.broken(i, "undecodable", f"its picture is not usable: {error}", "leave it out") from error
        except ValueError as error:
            raise self.broken(i, "mismatch", f"it is no picture with a caption ({error})") from error
        ids = np.array(self.tokenizer.encode(pair_text(pair.caption)), np.int32)
        view = understanding_view(picture, self.geometry.understanding_size)
        segments = (Segment(image=0, has_loss=False), Segment(ids))
        return Sample(self.source.uid(i), segments=segments, images=(view,))

    def _read_interleaved(self, i: int) -> Sample:
        members = self.members(i)
        try:
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
        except (KeyError, TypeError, ValueError) as error:
            raise self.broken(i, "undecodable", f"its document is damaged ({error!r})") from error
        images = tuple(self._image(members, name, i) for name in names)
        return Sample(self.source.uid(i), segments=tuple(segments), images=images)

    def _image(self, members: dict[str, memoryview], name: str, i: int) -> np.ndarray:
        try:
            return understanding_view(decode_image(bytes(members[name])), self.geometry.understanding_size)
        except (ImageError, KeyError) as error:
            raise self.broken(
                i,
                "undecodable",
                f"member {name!r} is no usable picture: {error}",
                "remove or replace the raw picture and run `janus-mega data prepare` again",
            ) from error

    def members(self, i: int) -> dict[str, memoryview]:
        """The stored members of an interleaved sample by the part of their name after the key.

        Raises:
            BrokenSample, UserError: As `read`.
        """
        shard, _ = self.source.place_of(i)
        block = self._checked(i, shard, self._row(i, shard))
        view = memoryview(block)
        members: dict[str, memoryview] = {}
        try:
            for member in scan_stretch(view):
                members[split_name(member.name)[1]] = view[member.data : member.data + member.size]
        except ValueError as error:
            raise self.broken(i, "mismatch", f"the index is wrong about where it lies ({error})") from error
        return members

    def broken(self, i: int, reason: str, what: str, remedy: str = _REDO) -> BrokenSample:
        """The error that says what is wrong with sample i; `reason` as in `BrokenSample`."""
        shard, _ = self.source.place_of(i)
        path = self.source.shard_path(shard)
        return BrokenSample(
            f"{path}: sample {self.source.uid(i)}: {what}; {remedy}",
            shard=str(path),
            offset=int(self.source.offset[i]),
            uid=self.source.uid(i),
            reason=reason,
        )

    def _text_ids(self, row: bytes | memoryview) -> np.ndarray:
        return np.frombuffer(row, self._token_dtype).astype(np.int32)

    def _row(self, i: int, shard: int) -> bytes:
        return self._part(i, shard, int(self.source.offset[i]), int(self.source.length[i]))

    def _checked(self, i: int, shard: int, *parts: bytes) -> bytes:
        """Returns the last part if the crc32 over all parts is the index's."""
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        if crc != int(self.source.crc[i]):
            expected = int(self.source.crc[i])
            raise self.broken(
                i, "checksum", f"its crc32 is {crc:08x}, the index says {expected:08x}: the tar is damaged"
            )
        return parts[-1]

    def _part(self, i: int, shard: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard."""
        data = self.files.read(shard, offset, size)
        if len(data) != size:
            raise self.broken(
                i, "truncated", f"the tar is truncated: {size} bytes wanted at {offset}, {len(data)} there"
            )
        return data


def npy_payload(member: memoryview | bytes) -> memoryview:
    """The array bytes of a .npy member (format 1.0), header skipped.

    Raises:
        ValueError: No .npy.
    """
    view = memoryview(member)
    if bytes(view[:6]) != b"\x93NUMPY" or view[6] != 1:
        raise ValueError("not a .npy of format 1.0")
    return view[10 + int.from_bytes(view[8:10], "little") :]
