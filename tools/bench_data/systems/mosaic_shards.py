"""mosaic-streaming: MDS shards read in this process by StreamingDataset with its default shuffling.

Its package imports torchvision for data sets that are not used here; where that is not installed, an empty stand-in is.
"""

import gc
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench_data.raw import photo_samples, token_samples
from tools.bench_data.systems.interface import BATCH, System, Tokens, hash_of
from tools.bench_data.systems.pillow_way import our_square, square_of_bytes


def _stand_in(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(content)
    sys.modules[name] = module


if importlib.util.find_spec("torchvision") is None:
    _stand_in("torchvision")
    _stand_in("torchvision.transforms")
    _stand_in("torchvision.transforms.functional", to_tensor=None)
    _stand_in("torchvision.datasets", VisionDataset=object)

from streaming import MDSWriter, StreamingDataset  # noqa: E402


class MosaicShards(System):
    """StreamingDataset without a loader around it."""

    packages = ("mosaicml-streaming",)

    def convert_tokens(self, raw: Path, root: Path) -> None:
        """Writes shards; ids are stored as bytes, for its array encoding knows no empty array."""
        with MDSWriter(out=str(root), columns={"vq": "bytes", "tok": "bytes", "uid": "str"}) as writer:
            for name, image_ids, text_ids in token_samples(raw):
                writer.write({"vq": image_ids.tobytes(), "tok": text_ids.tobytes(), "uid": name})

    def convert_photos(self, photos: Path, root: Path) -> None:
        """Writes shards."""
        with MDSWriter(out=str(root), columns={"jpg": "bytes", "txt": "str", "uid": "str"}) as writer:
            for name, content, caption in photo_samples(photos):
                writer.write({"jpg": content, "txt": caption, "uid": name})

    def index_bytes(self, root: Path) -> int:
        """index.json; the offsets inside the shards count as data."""
        return (root / "index.json").stat().st_size

    def open_tokens(self, root: Path, variant: str) -> Any:
        """The dataset."""
        return _open(root)

    def tokens(self, opened: Any) -> Iterator[Tokens]:
        """Samples in its shuffled order."""
        for sample in opened:
            yield np.frombuffer(sample["vq"], "<u2"), np.frombuffer(sample["tok"], "<u2")

    def photos(self, root: Path, variant: str) -> Iterator[np.ndarray]:
        """Photos, decoded from the stored bytes."""
        square = our_square if variant == "ours" else square_of_bytes
        return (square(sample["jpg"]) for sample in _open(root))

    def open_reader(self, root: Path) -> Callable[[int], Tokens]:
        """By index."""
        dataset = _open(root)

        def read(number: int) -> Tokens:
            sample = dataset[number]
            return np.frombuffer(sample["vq"], "<u2"), np.frombuffer(sample["tok"], "<u2")

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
        state.write_text(json.dumps(dataset.state_dict(num_batches * BATCH, from_beginning=True)), encoding="utf-8")
        return [_hash(samples) for _ in range(3)]

    def restore(self, root: Path, state: Path) -> Iterator[str]:
        """A new dataset with the state loaded."""
        dataset = _open(root)
        dataset.load_state_dict(json.loads(state.read_text(encoding="utf-8")))
        samples = iter(dataset)
        while True:
            yield _hash(samples)


def _open(root: Path) -> StreamingDataset:
    # A dataset of the same directory that is not yet collected would be taken for another job's.
    gc.collect()
    return StreamingDataset(local=str(root), shuffle=True, shuffle_seed=0, batch_size=BATCH)


def _hash(samples: Iterator[dict[str, Any]]) -> str:
    batch = [next(samples) for _ in range(BATCH)]
    return hash_of((np.frombuffer(one["vq"], "<u2"), np.frombuffer(one["tok"], "<u2")) for one in batch)


SYSTEM = MosaicShards()
