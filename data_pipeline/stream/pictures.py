"""Raw pictures as an image tokenizer's training data: which there are, in which order, how they are cropped.

Read straight from the records that the t2i prepare command takes, before any shard exists (there are no ids yet). Each
picture counts once, however many captions it has. The order is a permutation per epoch, a pure function of seed and
number of pictures, so position in the data is one integer and no rank count changes it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode_image, generation_view
from data_pipeline.prepare.records import RawRecord, Reject, open_records

CACHE_BYTES = 256 * 1024 * 1024
"""Cropped pictures are kept in memory if all of them fit in this."""


class PictureSet:
    """The distinct pictures of some raw records, cropped for the image tokenizer."""

    def __init__(self, inputs: Sequence[str | Path], size: int) -> None:
        """List the pictures; none is read yet.

        Args:
            inputs: .jsonl files with `image` in every record, or directories of such.
            size: side of the square crop, pixels.

        Raises:
            UserError: an input is missing, a record names no picture, or there is no record at all.
        """
        self.size = size
        self._records: dict[tuple[Path, str], RawRecord] = {}
        source = open_records(inputs)
        for record in source.read(0, source.count()):
            try:
                name = record.fields().get("image")
            except Reject as error:
                raise UserError(f"{record}: {error}; correct or remove the record") from error
            if not isinstance(name, str):
                raise UserError(f"{record}: no 'image' in this record; give records of pictures, one 'image' each")
            self._records.setdefault((record.home, name), record)
        if not self._records:
            raise UserError(f"{', '.join(map(str, inputs))}: no record; give a .jsonl with pictures")
        self._keys = list(self._records)
        self._cache: dict[int, np.ndarray] | None = {} if len(self) * 3 * size * size <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def digest(self) -> str:
        """sha256 (hex) over the names of the pictures in order, relative to their records' directory."""
        return hashlib.sha256("\n".join(name for _, name in self._keys).encode()).hexdigest()

    def read(self, number: int) -> np.ndarray:
        """One picture, uint8 [3, size, size].

        Raises:
            UserError: the file is missing or does not decode.
        """
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        key = self._keys[number]
        record = self._records[key]
        try:
            picture = generation_view(decode_image(record.picture(key[1])), self.size)
        except (Reject, ImageError) as error:
            raise UserError(f"{record}: image {key[1]!r}: {error}; correct or remove the record") from error
        if self._cache is not None:
            self._cache[number] = picture
        return picture

    def read_many(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures in the order asked for, uint8 [n, 3, size, size]."""
        return np.stack([self.read(int(number)) for number in numbers])


def epoch_order(num_pictures: int, start: int, count: int, seed: int) -> np.ndarray:
    """Numbers int64 [count] at positions start ... start + count - 1 of epoch after epoch, each its own permutation."""
    parts = []
    position, stop = start, start + count
    while position < stop:
        epoch, offset = divmod(position, num_pictures)
        order = np.random.default_rng([seed, epoch]).permutation(num_pictures)
        parts.append(order[offset : offset + stop - position])
        position += len(parts[-1])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
