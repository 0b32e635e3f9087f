"""Captioned pictures to block records of image ids and caption ids: what drawing is learnt from.

The image tokenizer is injected, so that this room stays torch-free. A picture with several captions is encoded once and
becomes one sample per caption. The dialogue template is not baked in: captions are stored as they follow a colon.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.dialogue import caption_text
from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode_image, generation_view
from data_pipeline.manifest import ImageTokenizerEntry
from data_pipeline.prepare.directory import Facts
from data_pipeline.prepare.options import PrepareOptions, PrepareReport, Progress
from data_pipeline.prepare.records import RawRecord, Reject, checked_text, text_field
from data_pipeline.prepare.run import run_prepare
from data_pipeline.prepare.shard import FlatIds, ImageIds, ShardWriter, npy_bytes, token_dtype
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.uid import uid_text


class ImageTokenizer(Protocol):
    """A frozen image tokenizer, as prepare needs it."""

    image_size: int
    """Side of the pictures, pixels."""
    num_tokens: int
    """Ids per picture."""
    codebook_size: int
    """Number of ids."""
    digest: str
    """sha256 over weights and preprocessing, hex."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures uint8 [n, 3, image_size, image_size] to ids uint16 [n, num_tokens] in raster order."""
        ...


def prepare_t2i(
    inputs: Iterable[str | Path],
    out: str | Path,
    tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer,
    *,
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes shards of kind t2i; continues where an earlier call was stopped.

    Records are `{"image": path, "caption": ... | "captions": [...]}`; pictures get the generation crop.

    Raises:
        UserError: Bad input, a picture that does not decode (unless skipped), or a directory that holds something else.
    """
    options = options or PrepareOptions()
    return run_prepare(_T2iPreparer(tokenizer, image_tokenizer, options), inputs, Path(out), options, progress)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A sample that waits for its record."""

    uid: str
    caption_ids: list[int]
    caption_number: int
    """Its number among the captions of the picture."""
    image: int
    """Number of its picture within the shard."""


class _T2iPreparer:
    """Encodes pictures in batches and writes a record whenever one is full."""

    def __init__(self, tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer, options: PrepareOptions) -> None:
        if not 0 < image_tokenizer.codebook_size <= 1 << 16:
            raise UserError(
                f"the image tokenizer has codebook_size {image_tokenizer.codebook_size}; ids are stored in 16 bits, "
                "so use one with at most 65536 codes"
            )
        self._tokenizer = tokenizer
        self._image_tokenizer = image_tokenizer
        self._record_size = options.record_size
        self._batch_size = options.encode_batch_size
        entry = ImageTokenizerEntry(
            digest=image_tokenizer.digest,
            image_size=image_tokenizer.image_size,
            num_tokens=image_tokenizer.num_tokens,
            codebook_size=image_tokenizer.codebook_size,
        )
        self.facts = Facts(
            kind="t2i",
            text_tokenizer=tokenizer.digest,
            token_dtype=token_dtype(tokenizer),
            image_tokenizer=entry,
            record_size=options.record_size,
        )
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._samples: list[_Pending] = []
        self._pictures: list[np.ndarray] = []
        self._image_rows: dict[int, np.ndarray] = {}
        self._num_images = 0

    def settings(self) -> dict[str, Any]:
        """What the bytes depend on; batches can change the last bit of an encoder's sums."""
        return {
            "text_tokenizer": self._tokenizer.digest,
            "image_tokenizer": asdict(self.facts.image_tokenizer) if self.facts.image_tokenizer else None,
            "record_size": self._record_size,
            "encode_batch_size": self._batch_size,
        }

    def add(self, record: RawRecord, writer: ShardWriter) -> None:
        """Adds a picture with its captions.

        Raises:
            Reject: No picture, no caption, or a picture that does not decode.
        """
        fields = record.fields()
        captions = _captions(fields)
        name = fields.get("image")
        content = record.picture(name)
        try:
            picture = generation_view(decode_image(content), self._image_tokenizer.image_size)
        except ImageError as error:
            raise Reject("undecodable_image", f"image {name!r} is no usable picture: {error}") from error
        uid = uid_text(record.identity(fields))
        for number, caption in enumerate(captions):
            ids = self._tokenizer.encode(caption_text(caption))
            self._samples.append(_Pending(uid, ids, number, self._num_images))
        self._pictures.append(picture)
        self._num_images += 1
        if len(self._pictures) >= self._batch_size:
            self._encode()
        while len(self._samples) >= self._record_size:
            self._write_record(writer)

    def end_shard(self, writer: ShardWriter) -> None:
        """Writes the rest and forgets this shard."""
        while self._samples:
            self._write_record(writer)
        self._begin_shard()

    def _encode(self) -> None:
        """Turns the pictures at hand into ids."""
        if not self._pictures:
            return
        first = self._num_images - len(self._pictures)
        ids = self._image_tokenizer.encode(np.stack(self._pictures))
        expected = (len(self._pictures), self._image_tokenizer.num_tokens)
        if ids.shape != expected or ids.dtype != np.uint16 or int(ids.max()) >= self._image_tokenizer.codebook_size:
            raise UserError(
                f"the image tokenizer gave {ids.dtype} {ids.shape} with ids up to {int(ids.max())}; it promises uint16 "
                f"{expected} below {self._image_tokenizer.codebook_size}: correct the tokenizer"
            )
        self._image_rows.update(enumerate(ids, start=first))
        self._pictures = []

    def _write_record(self, writer: ShardWriter) -> None:
        """Writes the first samples at hand as one record."""
        self._encode()
        samples, self._samples = self._samples[: self._record_size], self._samples[self._record_size :]
        images = sorted({sample.image for sample in samples})
        row_of = {image: row for row, image in enumerate(images)}
        rows = np.stack([self._image_rows[image] for image in images]).astype("<u2")
        ids = FlatIds(self.facts.token_dtype)
        drawn = []
        for sample in samples:
            ids.append(sample.caption_ids)
            row = row_of[sample.image]
            drawn.append(ImageIds(rows[row].tobytes(), row * rows[row].nbytes, sample.caption_number))
        facts = {
            "v": 1,
            "n": len(samples),
            "vq": f"sha256:{self._image_tokenizer.digest}",
            "codebook": self._image_tokenizer.codebook_size,
            "image_size": self._image_tokenizer.image_size,
            "text_tokenizer": f"sha256:{self._tokenizer.digest}",
        }
        members = {
            "json": json.dumps(facts, sort_keys=True).encode(),
            "cap.npy": npy_bytes(np.array([row_of[sample.image] for sample in samples], "<u4")),
            "vq.npy": npy_bytes(rows),
        }
        writer.add_record([sample.uid for sample in samples], members, ids, drawn)
        kept = self._samples[0].image if self._samples else self._num_images
        self._image_rows = {number: row for number, row in self._image_rows.items() if number >= kept}


def _captions(fields: dict[str, Any]) -> list[str]:
    """The captions of a record that are not empty.

    Raises:
        Reject: There is none.
    """
    given = fields.get("captions")
    if given is None:
        texts = [text_field(fields, "caption")]
    elif isinstance(given, list):
        texts = [checked_text(caption, "captions") for caption in given]
    else:
        raise Reject("bad_record", "'captions' must be a list of texts")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise Reject("empty_text", "the caption is empty")
    return texts
