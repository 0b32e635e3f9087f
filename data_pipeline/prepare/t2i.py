"""Captioned pictures to block records of image ids and caption ids: what drawing is learnt from.

The image tokenizer is injected, so that this room stays torch-free. A picture is encoded and its ids are stored once,
however many captions it has; each caption is a sample of the same uid. Crops of one picture lie side by side. The
dialogue template is not baked in: captions are stored as they follow a colon.
"""

import json
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dialogue import caption_text
from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode_image
from data_pipeline.manifest import ImageTokenizerEntry
from data_pipeline.prepare.crops import crop, distinct, preprocessing
from data_pipeline.prepare.directory import Facts
from data_pipeline.prepare.encoding import Ahead, ImageTokenizer, PictureEncoder
from data_pipeline.prepare.meta import Meta, sample_meta
from data_pipeline.prepare.options import PrepareOptions, PrepareReport, Progress
from data_pipeline.prepare.records import RawRecord, Reject
from data_pipeline.prepare.run import run_prepare
from data_pipeline.prepare.segments import captions_of
from data_pipeline.prepare.shard import FlatIds, ImageIds, ShardWriter, npy_bytes, token_dtype
from data_pipeline.prepare.task import Preparer
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.uid import uid_text

MAX_CAPTIONS = 256
"""Captions of one picture; the index numbers them in a byte."""
MAX_THREADS = 8
"""Threads of one process that read and decode pictures."""


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
class _Loaded:
    """What threads make of a record."""

    uid: str
    captions: list[str]
    metas: list[Meta]
    """What is known of each caption's sample."""
    crops: list[np.ndarray]
    """The different ones, uint8 [3, size, size]."""
    which: list[int]
    """Which of them each stored crop is."""


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A picture that waits for its ids and its record."""

    uid: str
    caption_ids: list[list[int]]
    metas: list[Meta]
    crops: list[int]
    """Number of each crop among the encoder's pictures."""


class _T2iPreparer(Preparer):
    """Encodes pictures in batches and writes a record whenever one is full and its ids are known."""

    def __init__(self, tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer, options: PrepareOptions) -> None:
        if not 0 < image_tokenizer.codebook_size <= 1 << 16:
            raise UserError(
                f"the image tokenizer has codebook_size {image_tokenizer.codebook_size}; ids are stored in 16 bits, "
                "so use one with at most 65536 codes"
            )
        self._tokenizer = tokenizer
        self._image_tokenizer = image_tokenizer
        self._options = options
        self._entry = ImageTokenizerEntry(
            digest=image_tokenizer.digest,
            image_size=image_tokenizer.image_size,
            num_tokens=image_tokenizer.num_tokens,
            codebook_size=image_tokenizer.codebook_size,
            num_variants=options.crops,
            preprocessing=preprocessing(image_tokenizer.image_size, options.crops, options.flips),
        )
        self.facts = Facts(
            kind="t2i",
            text_tokenizer=tokenizer.digest,
            token_dtype=token_dtype(tokenizer),
            image_tokenizer=self._entry,
            record_size=options.record_size,
        )
        self.lookahead = max(1, 2 * options.encode_batch_size // options.crops)
        threads = len(os.sched_getaffinity(0)) // options.workers
        self._loading: Ahead[_Loaded] = Ahead(max(1, min(threads, MAX_THREADS)))
        self._encoder = PictureEncoder(image_tokenizer, options.encode_batch_size)
        self.abandon()

    def abandon(self) -> None:
        """See Preparer."""
        self._loading.close()
        self._encoder.close()
        self._full: deque[list[_Drawing]] = deque()
        self._open: list[_Drawing] = []
        self._num_open = 0

    def settings(self) -> dict[str, Any]:
        """What the bytes depend on; batches can change the last bit of an encoder's sums."""
        entry = asdict(self._entry)
        del entry["preprocessing"]  # a newer library may open what an older one has finished
        return {
            "text_tokenizer": self._tokenizer.digest,
            "image_tokenizer": entry,
            "record_size": self._options.record_size,
            "encode_batch_size": self._options.encode_batch_size,
            "flips": self._options.flips,
        }

    def announce(self, record: RawRecord) -> None:
        """Has its picture read, decoded and cropped in a thread."""
        self._loading.ask(partial(self._load, record))

    def _load(self, record: RawRecord) -> _Loaded:
        """Everything about a record that needs neither its neighbours nor a tokenizer.

        Raises:
            Reject: No picture, no caption, or a picture that does not decode.
        """
        fields = record.fields()
        captions = _captions(fields)
        uid = uid_text(record.identity(fields))
        name = fields.get("image")
        content = record.picture(name)
        try:
            pixels = decode_image(content)
            crops = crop(pixels, uid, self._entry.image_size, self._options.crops, self._options.flips)
        except ImageError as error:
            raise Reject("undecodable_image", f"image {name!r} is no usable picture: {error}") from error
        keep, size = self._options.importing.keep_columns, (pixels.shape[1], pixels.shape[0])
        metas: list[Meta] = [sample_meta(fields, keep, size=size, caption=caption) for caption in captions]
        return _Loaded(uid, captions, metas, *distinct(crops))

    def add(self, record: RawRecord, writer: ShardWriter) -> None:
        """Adds a picture with its captions.

        Raises:
            Reject: No picture, no caption, or a picture that does not decode.
        """
        loaded = self._loading.take()
        numbers = [self._encoder.add(crop) for crop in loaded.crops]
        captions = [self._tokenizer.encode(caption_text(caption)) for caption in loaded.captions]
        if self._open and self._num_open + len(captions) > self._options.record_size:
            self._close_record()
        self._open.append(_Drawing(loaded.uid, captions, loaded.metas, [numbers[crop] for crop in loaded.which]))
        self._num_open += len(captions)
        self._write_records(writer)

    def end_shard(self, writer: ShardWriter) -> None:
        """Writes the rest and forgets this shard."""
        self._encoder.flush()
        if self._open:
            self._close_record()
        self._write_records(writer)
        self.abandon()

    def _close_record(self) -> None:
        self._full.append(self._open)
        self._open, self._num_open = [], 0

    def _write_records(self, writer: ShardWriter) -> None:
        """Writes the full records whose last picture has its ids."""
        while self._full and max(self._full[0][-1].crops) < self._encoder.num_ready:
            self._write_record(self._full.popleft(), writer)

    def _write_record(self, drawings: list[_Drawing], writer: ShardWriter) -> None:
        rows = np.stack([self._row(drawing) for drawing in drawings]).astype("<u2")  # [images, crops * num_tokens]
        ids = FlatIds(self.facts.token_dtype)
        uids, image_rows, drawn, metas = [], [], [], []
        for row, drawing in enumerate(drawings):
            metas += drawing.metas
            for number, caption_ids in enumerate(drawing.caption_ids):
                ids.append(caption_ids)
                uids.append(drawing.uid)
                image_rows.append(row)
                drawn.append(ImageIds(rows[row].tobytes(), row * rows[row].nbytes, number))
        facts = {
            "v": 1,
            "n": len(uids),
            "vq": f"sha256:{self._entry.digest}",
            "codebook": self._entry.codebook_size,
            "image_size": self._entry.image_size,
            "crops": self._entry.num_variants,
            "preprocessing": self._entry.preprocessing,
            "text_tokenizer": f"sha256:{self._tokenizer.digest}",
        }
        members = {
            "json": json.dumps(facts, sort_keys=True).encode(),
            "cap.npy": npy_bytes(np.array(image_rows, "<u4")),
            "vq.npy": npy_bytes(rows),
        }
        writer.add_record(uids, members, ids, drawn, metas)

    def _row(self, drawing: _Drawing) -> np.ndarray:
        """Ids of all crops of a picture, uint16 [crops * num_tokens]."""
        ids = {number: self._encoder.take(number) for number in sorted(set(drawing.crops))}
        return np.concatenate([ids[number] for number in drawing.crops])


def _captions(fields: dict[str, Any]) -> list[str]:
    """The captions of a record that are not empty.

    Raises:
        Reject: There is none, or there are too many.
    """
    texts = captions_of(fields)
    if len(texts) > MAX_CAPTIONS:
        raise Reject("too_many_captions", f"{len(texts)} captions of one picture, at most {MAX_CAPTIONS} are allowed")
    return texts
