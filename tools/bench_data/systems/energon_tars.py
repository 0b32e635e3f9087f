"""Megatron-Energon: the tars of webdataset's layout, prepared by Energon, read in this process through its loader.

Variants: by default its loader collects garbage every ten batches; `tuned` switches that off.
"""

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    Cooker,
    CrudeWebdataset,
    DefaultTaskEncoder,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.cache.file_store import WebdatasetFileStore
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import Sample
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.savable_loader import SavableDataLoaderState
from megatron.energon.state import FlexState

from tools.bench_data.raw import sample_names
from tools.bench_data.systems.interface import BATCH, SAMPLES_PER_SHARD, SHUFFLE_BUFFER, System, Tokens, hash_of
from tools.bench_data.systems.pillow_way import our_square, square
from tools.bench_data.systems.webdataset_tars import write_photo_tars, write_token_tars


@edataclass
class _TokenSample(Sample):
    image_ids: Any
    text_ids: Any


@edataclass
class _PhotoSample(Sample):
    pixels: np.ndarray


@stateless
def _cook_tokens(sample: dict[str, Any]) -> _TokenSample:
    return _TokenSample(**basic_sample_keys(sample), image_ids=sample.get("vq.npy", ()), text_ids=sample["tok.npy"])


@stateless
def _cook_photo(sample: dict[str, Any]) -> _PhotoSample:
    picture = sample["jpg"]
    return _PhotoSample(
        **basic_sample_keys(sample), pixels=our_square(picture) if isinstance(picture, bytes) else square(picture)
    )


class _Lists(DefaultTaskEncoder):
    """Batches are lists: nothing is padded or stacked, as for the others."""

    @stateless
    def batch(self, samples: list[Any]) -> Any:
        return samples


class _TokenEncoder(_Lists):
    cookers = (Cooker(_cook_tokens),)


class _PhotoEncoder(_Lists):
    cookers = (Cooker(_cook_photo),)
    decoder = SampleDecoder(image_decode="pil")


class _RawPhotoEncoder(_Lists):
    cookers = (Cooker(_cook_photo),)
    decoder = None


class EnergonTars(System):
    """Energon in the process, one worker, saveable loader."""

    packages = ("megatron-energon", "webdataset")

    def convert_tokens(self, raw: Path, root: Path) -> None:
        """Writes tars and prepares them."""
        root.mkdir()
        _prepare(root, write_token_tars(raw, root))

    def convert_photos(self, photos: Path, root: Path) -> None:
        """Writes tars and prepares them."""
        root.mkdir()
        _prepare(root, write_photo_tars(photos, root))

    def index_bytes(self, root: Path) -> int:
        """The .nv-meta directory and the .idx files beside the tars."""
        return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".tar")

    def open_tokens(self, root: Path, variant: str) -> Any:
        """The loader over one epoch."""
        return _loader(root, _TokenEncoder(), gc=variant != "tuned")

    def tokens(self, opened: Any) -> Iterator[Tokens]:
        """Samples of its batches."""
        for batch in opened:
            for sample in batch:
                yield sample.image_ids, sample.text_ids

    def photos(self, root: Path, variant: str) -> Iterator[np.ndarray]:
        """Photos of its batches; without garbage collection, whose start would weigh on so few."""
        encoder = _RawPhotoEncoder() if variant == "ours" else _PhotoEncoder()
        return (sample.pixels for batch in _loader(root, encoder, gc=False) for sample in batch)

    def open_reader(self, root: Path) -> Callable[[int], Tokens]:
        """By the names of members, through its sqlite index, decoded as .npy."""
        store = WebdatasetFileStore(EPath(root))
        names = sample_names(root.parent / "raw")

        def member(name: str) -> np.ndarray:
            return np.load(io.BytesIO(store[name][0]), allow_pickle=False)

        def read(number: int) -> Tokens:
            name = names[number]
            return (member(f"{name}.vq.npy") if name.startswith("d") else ()), member(f"{name}.tok.npy")

        return read

    def first_batch(self, root: Path) -> int:
        """The first batch of a new loader."""
        return len(next(iter(_loader(root, _TokenEncoder(), repeat=True))))

    def save(self, root: Path, state: Path, num_batches: int) -> list[str]:
        """Saves the state of the loader as torch writes it, which is what its documentation does."""
        loader = _loader(root, _TokenEncoder(), repeat=True)
        batches = iter(loader)
        for _ in range(num_batches):
            next(batches)
        position = loader.save_state_rank()
        torch.save(position, state)
        torch.save(_plain(position), _plain_path(state))
        return [_hash(next(batches)) for _ in range(3)]

    def restore(self, root: Path, state: Path) -> Iterator[str]:
        """A new loader with the state put back."""
        loader = _loader(root, _TokenEncoder(), repeat=True)
        with torch.serialization.safe_globals([SliceState]):
            position = torch.load(_plain_path(state), weights_only=True)
        loader.restore_state_rank(_unplain(position))
        return (_hash(batch) for batch in loader)


def _prepare(root: Path, names: list[str]) -> None:
    CrudeWebdataset.prepare_dataset(root, names, split_parts_ratio=[("train", 1.0)], workers=1)
    (root / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )


def _loader(root: Path, encoder: DefaultTaskEncoder, *, gc: bool = True, repeat: bool = False) -> Any:
    """A loader over one epoch, or without end as in training (a restored single epoch is not exact near its end)."""
    options = {} if gc else {"gc_collect_every_n_steps": 0}
    dataset = get_train_dataset(
        root,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=SAMPLES_PER_SHARD,
        task_encoder=encoder,
        repeat=repeat,
    )
    return get_savable_loader(dataset, watchdog_timeout_seconds=None, **options)


def _plain_path(state: Path) -> Path:
    """Beside the state as Energon's users write it, for its size, lies one that can be read without unpickling."""
    return state.with_name(state.name + ".plain")


def _plain(position: SavableDataLoaderState) -> dict[str, Any]:
    fields = {field.name: getattr(position, field.name) for field in dataclasses.fields(position)}
    return {name: _dicts(value, FlexState, dict) for name, value in fields.items()}


def _unplain(fields: dict[str, Any]) -> SavableDataLoaderState:
    return SavableDataLoaderState(**{name: _dicts(value, dict, FlexState) for name, value in fields.items()})


def _dicts(value: Any, given: Any, wanted: Any) -> Any:
    """The same value with dicts of one type in place of another."""
    if isinstance(value, given):
        return wanted((name, _dicts(part, given, wanted)) for name, part in value.items())
    if type(value) in (list, tuple):
        return type(value)(_dicts(part, given, wanted) for part in value)
    return value


def _hash(batch: list[_TokenSample]) -> str:
    return hash_of((sample.image_ids, sample.text_ids) for sample in batch)


SYSTEM = EnergonTars()
