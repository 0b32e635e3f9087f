"""litdata: chunks written by `optimize`, read in this process by StreamingDataset with shuffling."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from litdata import StreamingDataset, optimize

from tools.bench_data.raw import photo_samples, token_samples
from tools.bench_data.systems.interface import BATCH, System, Tokens, hash_of
from tools.bench_data.systems.pillow_way import our_square, square_of_bytes

_CHUNK_BYTES = "64MB"


def _token_item(sample: tuple[str, np.ndarray, np.ndarray]) -> dict[str, Any]:
    return {"vq": sample[1], "tok": sample[2], "uid": sample[0]}


def _photo_item(sample: tuple[str, bytes, str]) -> dict[str, Any]:
    return {"jpg": sample[1], "txt": sample[2], "uid": sample[0]}


class LitdataChunks(System):
    """StreamingDataset without a loader around it, which is its least costly use."""

    packages = ("litdata",)

    def convert_tokens(self, raw: Path, root: Path) -> None:
        """Writes chunks."""
        _optimize(_token_item, token_samples(raw), root)

    def convert_photos(self, photos: Path, root: Path) -> None:
        """Writes chunks."""
        _optimize(_photo_item, photo_samples(photos), root)

    def index_bytes(self, root: Path) -> int:
        """index.json; the offsets inside the chunks count as data."""
        return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".bin")

    def open_tokens(self, root: Path, variant: str) -> Any:
        """The dataset."""
        return _open(root)

    def tokens(self, opened: Any) -> Iterator[Tokens]:
        """Samples in its shuffled order."""
        for sample in opened:
            yield sample["vq"], sample["tok"]

    def photos(self, root: Path, variant: str) -> Iterator[np.ndarray]:
        """Photos, decoded from the stored bytes."""
        square = our_square if variant == "ours" else square_of_bytes
        return (square(sample["jpg"]) for sample in _open(root))

    def open_reader(self, root: Path) -> Callable[[int], Tokens]:
        """By index."""
        dataset = StreamingDataset(str(root))

        def read(number: int) -> Tokens:
            sample = dataset[number]
            return sample["vq"], sample["tok"]

        return read

    def first_batch(self, root: Path) -> int:
        """The first samples of a new dataset."""
        samples = iter(_open(root))
        return len([next(samples) for _ in range(BATCH)])

    def save(self, root: Path, state: Path, num_batches: int) -> list[str]:
        """Saves state_dict() as JSON."""
        dataset = _open(root)
        samples = iter(dataset)
        for _ in range(num_batches * BATCH):
            next(samples)
        state.write_text(json.dumps(dataset.state_dict(num_batches * BATCH, 0, BATCH)), encoding="utf-8")
        return [_hash(samples) for _ in range(3)]

    def restore(self, root: Path, state: Path) -> Iterator[str]:
        """A new dataset with the state loaded."""
        dataset = _open(root)
        dataset.load_state_dict(json.loads(state.read_text(encoding="utf-8")))
        samples = iter(dataset)
        while True:
            yield _hash(samples)


def _optimize(item: Any, samples: list[Any], root: Path) -> None:
    optimize(item, samples, str(root), chunk_bytes=_CHUNK_BYTES, num_workers=1, start_method="fork", verbose=False)


def _open(root: Path) -> StreamingDataset:
    return StreamingDataset(str(root), shuffle=True, drop_last=False, seed=0)


def _hash(samples: Iterator[dict[str, Any]]) -> str:
    batch = [next(samples) for _ in range(BATCH)]
    return hash_of((sample["vq"], sample["tok"]) for sample in batch)


SYSTEM = LitdataChunks()
