"""What a measured loader must be able to do. A system says no by raising `NotOffered`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Tokens = tuple[Any, Any]
"""Image ids and text ids of one sample; anything with a length, image ids of a text document are empty."""

ROW_TOKENS = 4096
"""Tokens of a packed row."""
BATCH = 64
"""Samples of a batch where a system has batches."""
SHUFFLE_BUFFER = 1000
"""Samples of a shuffle buffer where a system has one."""
SAMPLES_PER_SHARD = 2500
"""Samples of a tar."""


class NotOffered(Exception):
    """The system has no such thing; the message says what it has instead."""


def hash_of(samples: Iterable[Tokens]) -> str:
    """Hash (hex) of a batch of token samples, in their order."""
    digest = hashlib.sha256()
    for image_ids, text_ids in samples:
        for ids in (image_ids, text_ids):
            digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, "<u2").tobytes())
    return digest.hexdigest()


class System(ABC):
    """One loader. `root` is the directory its own conversion has written."""

    packages: tuple[str, ...] = ()
    """Distributions whose versions the record names."""

    @abstractmethod
    def convert_tokens(self, raw: Path, root: Path) -> None:
        """Writes the drawings and texts of the raw data in this system's format."""

    @abstractmethod
    def convert_photos(self, photos: Path, root: Path) -> None:
        """Writes the JPEG files of a directory, with captions.jsonl, in this system's format."""

    @abstractmethod
    def index_bytes(self, root: Path) -> int:
        """Bytes of what is no sample data: indexes, manifests."""

    @abstractmethod
    def open_tokens(self, root: Path, variant: str) -> Any:
        """A dataset over all token samples in random order, ready for one pass."""

    @abstractmethod
    def tokens(self, opened: Any) -> Iterator[Tokens]:
        """One pass over the samples."""

    def pass_over(self, opened: Any) -> dict[str, Any]:
        """Goes through one pass; returns how many samples and stored ids came."""
        samples = ids = 0
        for image_ids, text_ids in self.tokens(opened):
            samples += 1
            ids += len(image_ids) + len(text_ids)
        return {"samples": samples, "ids": ids}

    def sums(self, root: Path) -> list[int]:
        """Samples, ids and the sum of all ids: the same for every system, or one does not read what it should."""
        samples = ids = total = 0
        for image_ids, text_ids in self.tokens(self.open_tokens(root, "")):
            samples += 1
            ids += len(image_ids) + len(text_ids)
            total += int(np.sum(image_ids, dtype=np.int64)) + int(np.sum(text_ids, dtype=np.int64))
        return [samples, ids, total]

    @abstractmethod
    def photos(self, root: Path, variant: str) -> Iterator[np.ndarray]:
        """One pass over the photos in random order as uint8 at 384 px.

        Variants: `pillow` decodes and resizes as the system documents it, `ours` with the project's functions.
        """

    def open_reader(self, root: Path) -> Callable[[int], Tokens]:
        """What reads a token sample by its number.

        Raises:
            NotOffered: There is no random access.
        """
        raise NotOffered("no random access")

    @abstractmethod
    def first_batch(self, root: Path) -> int:
        """Opens the token data from nothing and returns the length of the first batch."""

    def save(self, root: Path, state: Path, num_batches: int) -> list[str]:
        """Goes through some batches, saves its position, and returns hashes of the three batches that follow.

        Raises:
            NotOffered: There is no state.
        """
        raise NotOffered("no state")

    def restore(self, root: Path, state: Path) -> Iterator[str]:
        """Continues from a saved position: hashes of the batches that follow.

        Raises:
            NotOffered: There is no state.
        """
        raise NotOffered("no state")
