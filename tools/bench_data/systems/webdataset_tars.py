"""webdataset: one sample a member run, shards and a buffer shuffled, decoded as its documentation does it.

Variant `sequence` reads the block records of our own tars with stock webdataset, in order, and splits them into
samples, which are views of what was read: what our bytes cost without random order and without packing. Variant `laid`
also copies these samples behind one another into rows of 4096 tokens.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from tools.bench_data.raw import photo_samples, token_samples
from tools.bench_data.systems.interface import BATCH, ROW_TOKENS, SAMPLES_PER_SHARD, SHUFFLE_BUFFER, System, Tokens
from tools.bench_data.systems.pillow_way import our_square, square, square_of_pixels


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file of an array."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def write_token_tars(raw: Path, root: Path) -> list[str]:
    """Writes one sample a key: vq.npy (drawings only), tok.npy, json; returns the names of the tars."""
    samples = token_samples(raw)
    names: list[str] = []
    for first in range(0, len(samples), SAMPLES_PER_SHARD):
        names.append(f"{len(names):06d}.tar")
        with wds.TarWriter(str(root / names[-1]), mtime=0) as tar:
            for name, image_ids, text_ids in samples[first : first + SAMPLES_PER_SHARD]:
                members = {"vq.npy": npy_bytes(image_ids)} if len(image_ids) else {}
                tar.write({"__key__": name, **members, "tok.npy": npy_bytes(text_ids), "json": {"uid": name}})
    return names


def write_photo_tars(photos: Path, root: Path) -> list[str]:
    """Writes key.jpg, key.txt and key.json; returns the names of the tars."""
    samples = photo_samples(photos)
    names: list[str] = []
    for first in range(0, len(samples), SAMPLES_PER_SHARD):
        names.append(f"{len(names):06d}.tar")
        with wds.TarWriter(str(root / names[-1]), mtime=0) as tar:
            for name, content, caption in samples[first : first + SAMPLES_PER_SHARD]:
                tar.write({"__key__": name, "jpg": content, "txt": caption, "json": {"uid": name}})
    return names


class WebDatasetTars(System):
    """Stock webdataset."""

    packages = ("webdataset",)

    def convert_tokens(self, raw: Path, root: Path) -> None:
        """Writes tars."""
        root.mkdir()
        write_token_tars(raw, root)

    def convert_photos(self, photos: Path, root: Path) -> None:
        """Writes tars."""
        root.mkdir()
        write_photo_tars(photos, root)

    def index_bytes(self, root: Path) -> int:
        """It has no index."""
        return 0

    def open_tokens(self, root: Path, variant: str) -> Any:
        """A shuffled pipeline, or (variant `sequence`) our tars in order."""
        if variant == "sequence":
            return wds.WebDataset(_tars(root), shardshuffle=False).decode()
        if variant == "laid":
            return _Laid(self.tokens(self.open_tokens(root, "sequence")))
        shards = _tars(root)
        return wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(SHUFFLE_BUFFER).decode()

    def tokens(self, opened: Any) -> Iterator[Tokens]:
        """Samples; those of block records are cut out of them."""
        if isinstance(opened, _Laid):
            yield from opened.samples()
            return
        for sample in opened:
            if "off.npy" not in sample:
                yield sample.get("vq.npy", ()), sample["tok.npy"]
                continue
            ids, image_ids = sample["tok.npy"], sample.get("vq.npy")
            start = 0
            for number, end in enumerate(sample["off.npy"].tolist()):
                yield (image_ids[number] if image_ids is not None else ()), ids[start:end]
                start = end

    def photos(self, root: Path, variant: str) -> Iterator[np.ndarray]:
        """Photos; variant `rgb8` has webdataset decode to an array first."""
        shards = _tars(root)
        dataset = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(SHUFFLE_BUFFER)
        if variant == "ours":
            return (our_square(sample["jpg"]) for sample in dataset)
        if variant == "rgb8":
            return (square_of_pixels(sample["jpg"]) for sample in dataset.decode("rgb8"))
        return (square(sample["jpg"]) for sample in dataset.decode("pil"))

    def first_batch(self, root: Path) -> int:
        """The first samples of a shuffled pipeline."""
        samples = iter(self.tokens(self.open_tokens(root, "")))
        return len([sample for sample, _ in zip(samples, range(BATCH), strict=False)])


class _Laid:
    """Lays samples into rows in their order, a new row where one does not fit."""

    def __init__(self, given: Iterator[Tokens]) -> None:
        self._given = given

    def samples(self) -> Iterator[Tokens]:
        """The samples, each as the parts of the row that it fills."""
        row, at = np.zeros(ROW_TOKENS, np.int32), 0
        for image_ids, text_ids in self._given:
            middle = at + len(image_ids)
            end = middle + len(text_ids)
            if end > ROW_TOKENS:
                row, middle, end = np.zeros(ROW_TOKENS, np.int32), middle - at, end - at
                at = 0
            row[at:middle] = image_ids
            row[middle:end] = text_ids
            yield row[at:middle], row[middle:end]
            at = end


def _tars(root: Path) -> list[str]:
    return [str(path) for path in sorted(root.rglob("*.tar"))]


SYSTEM = WebDatasetTars()
