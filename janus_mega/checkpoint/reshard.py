"""Rewrites a checkpoint's files for another layout: which rank's file gets which piece is a table, made here.

A run loads any checkpoint in any layout; this is for what that costs. Each stored piece is read as a whole, since its
digest is over the whole of it, so a thousand ranks that start from one rank's files would read them a thousand times.
Afterwards a rank reads its own pieces, from files of its own tensor- and pipeline-parallel place.

ZeRO-3 cuts every parameter over dp; the others cut the whole list of a place's parameters into equal runs, in an order
that only the optimizer knows. The runs here are in the order of layers, so at its ends a rank may read a neighbour's
file too. The one thing that is not rewritten is what a layout's ranks hold for themselves: generators stay those of the
ranks that saved, and a start in the new layout seeds its own.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import list_claims
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.format import CONFIG_FILE, INDEX_FILE, STATE_FILE, rank_file
from janus_mega.checkpoint.manager import key_of, list_checkpoints, save_files, write_note
from janus_mega.checkpoint.reader import EMA_PREFIX, OPTIMIZER_PREFIX, RNG_PREFIX, CheckpointReader
from janus_mega.checkpoint.tensor_file import file_rank
from janus_mega.checkpoint.tensor_writer import TensorWriter
from janus_mega.models.sharding import tp_parts
from janus_mega.parallel.layout import chunk_places
from janus_mega.parallel.slices import Box, Region, Slice, slices_of_range, whole

Progress = Callable[[int, int], None]
"""(tensors written, tensors in all)."""

FILES_AT_ONCE = 64
"""Files of ranks that are open at the same time; more are written in rounds, each of which reads what it needs."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_TENSOR_FILE = re.compile(r"tensors-\d+\.safetensors")
_LAST = ("decoder.final_layernorm.", "text_head.", "image_head.")
"""Beginnings of the names that live on the last pipeline rank; all but layers live on the first otherwise."""


@dataclass(frozen=True, slots=True)
class Target:
    """The layout that files are written for."""

    world_size: int
    tp_size: int
    layer_counts: tuple[int, ...]
    """Decoder layers of every chunk of the pipeline in the order of the stream."""
    pp_size: int
    cuts_parameters: bool = False
    """Whether dp ranks each hold a part of every parameter (ZeRO-3), not a run of parameters."""

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // (self.tp_size * self.pp_size)

    def rank(self, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """Number of the rank at a place; the inverse of `layout.Layout`."""
        return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank

    def pp_rank(self, name: str) -> int:
        """Pipeline rank of a parameter."""
        layer = _LAYER.match(name)
        for pp_rank in range(self.pp_size):
            for place in chunk_places(self.layer_counts, self.pp_size, pp_rank):
                if (
                    int(layer[1]) in place.layers
                    if layer
                    else place.is_last
                    if name.startswith(_LAST)
                    else place.is_first
                ):
                    return pp_rank
        raise ValueError(f"{name}: the model has {sum(self.layer_counts)} layers")


Parts = Mapping[str, Sequence[tuple[int, Box]]]
"""Tensor name -> (rank, what its file gets); each element exactly once."""


def plan_parts(shapes: Mapping[str, tuple[int, ...]], target: Target) -> Parts:
    """Which rank's file gets which boxes of the tensors of a checkpoint.

    Args:
        shapes: global shape by name: weights, moments, averages, generators.
        target: the layout.

    Raises:
        ValueError: a tensor cannot be cut in this way.
    """
    trained = {_parameter(name) for name in shapes if name.startswith(OPTIMIZER_PREFIX)}
    places: dict[tuple[int, int, bool], list[_Local]] = {}
    for name in sorted((name for name in shapes if _parameter(name) == name), key=_natural):
        shape = shapes[name]
        for tp_rank, (local_shape, regions) in enumerate(tp_parts(name, shape, target.tp_size)):
            place = target.pp_rank(name), tp_rank, name in trained
            places.setdefault(place, []).append(_Local(name, shape, local_shape, regions))
    boxes: dict[str, list[tuple[int, Box]]] = {}
    for (pp_rank, tp_rank, _), held in places.items():
        for dp_rank, local, start, stop in _cut(held, target):
            rank = target.rank(tp_rank, dp_rank, pp_rank)
            boxes.setdefault(local.name, []).extend((rank, box) for box in local.boxes(start, stop))
    return {name: _generator(name, shapes[name], target) or boxes[_parameter(name)] for name in shapes}


@dataclass(frozen=True, slots=True)
class _Local:
    """A parameter as a tensor-parallel rank holds it."""

    name: str
    global_shape: tuple[int, ...]
    shape: tuple[int, ...]
    regions: tuple[Region, ...]

    def boxes(self, start: int, stop: int) -> list[Box]:
        """What a flat range of it holds of the global tensor."""
        flat = Slice(self.name, self.global_shape, (), torch.empty(stop - start, device="meta"))
        return [piece.box for piece in slices_of_range(flat, self.regions, self.shape, start)]


def _cut(held: Sequence[_Local], target: Target) -> Iterator[tuple[int, _Local, int, int]]:
    """(dp rank, parameter, flat range of it) of everything that a place holds."""
    dp_size = target.dp_size
    total, before = sum(prod(local.shape) for local in held), 0
    for local in held:
        size = prod(local.shape)
        for dp_rank in range(dp_size):
            if target.cuts_parameters:
                part = -(-size // dp_size)
                start, stop = dp_rank * part, (dp_rank + 1) * part
            else:
                start, stop = (total * number // dp_size - before for number in (dp_rank, dp_rank + 1))
            start, stop = max(start, 0), min(stop, size)
            if start < stop:
                yield dp_rank, local, start, stop
        before += size


def _generator(name: str, shape: tuple[int, ...], target: Target) -> list[tuple[int, Box]]:
    """Where a generator of a rank that saved goes; empty for other tensors."""
    return [(int(name.split("/")[1]) % target.world_size, whole(shape))] if name.startswith(RNG_PREFIX) else []


def _parameter(name: str) -> str:
    """Whose moment or average a tensor is; its own name for others; empty for generators."""
    if name.startswith(RNG_PREFIX):
        return ""
    return name.split("/", 1)[1] if name.startswith((OPTIMIZER_PREFIX, EMA_PREFIX)) else name


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def reshard(
    reader: CheckpointReader,
    root: Path,
    target: Target,
    *,
    disk: Disk = DISK,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Writes a checkpoint again with files for another layout, under `root`; returns its directory.

    Memory is one tensor and one stored piece. Values, names and state are those of the source.

    Args:
        reader: the checkpoint.
        root: folder that receives the step directory; made if missing.
        target: the layout.
        disk: where it happens.
        progress: told of tensors as they are written.

    Raises:
        UserError: the model cannot be cut so, the source is damaged, the disk is too small, or the step is there.
    """
    shapes = {name: reader.shape(name) for name in reader.names}
    try:
        parts = plan_parts(shapes, target)
    except ValueError as error:
        raise UserError(f"{reader.directory}: {error}; choose another layout") from None
    _check_place(reader, root)
    state = reader.read_state()
    manifest = reader.manifest
    sizes = {"world_size": target.world_size, "tp_size": target.tp_size, "pp_size": target.pp_size}
    about = {
        "world_size": target.world_size,
        "layout": manifest.get("layout", {"world_size": manifest["world_size"]}),
        "resharded_for": {**sizes, "dp_size": target.dp_size, "chunks": len(target.layer_counts)},
        **({"commit": manifest["commit"]} if "commit" in manifest else {}),
    }
    ours = {INDEX_FILE, STATE_FILE, CONFIG_FILE}
    extra: dict[str, bytes | Path] = {
        name: reader.path(name) for name in manifest["files"] if name not in ours and not _TENSOR_FILE.fullmatch(name)
    }

    def write(aside: Path) -> None:
        for first in range(0, target.world_size, FILES_AT_ONCE):
            ranks = range(first, min(first + FILES_AT_ONCE, target.world_size))
            _write_files(aside, reader, parts, ranks, disk, progress)

    return save_files(root, write, state, extra_files=extra, about=about, disk=disk)


def _check_place(reader: CheckpointReader, root: Path) -> None:
    if any(found.step == reader.step for found in list_checkpoints(root)):
        raise UserError(f"{root}: holds a checkpoint of step {reader.step} already; choose another folder")
    if any(claim.number for claim in list_claims(root)):  # 0: one like this, that was killed
        raise UserError(f"{root}: is the checkpoint folder of a run; choose a folder that no run has used")
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    needed = sum(entry["bytes"] for entry in reader.manifest["files"].values())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{root}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free; make room or choose "
            "another folder"
        )


def _write_files(
    aside: Path, reader: CheckpointReader, parts: Parts, ranks: range, disk: Disk, progress: Progress
) -> None:
    """The files and notes of some ranks; each stored piece that they need is read once."""
    # Shape and format are all that a header and a note need, and meta tensors hold nothing else.
    pieces: dict[int, list[Slice]] = {rank: [] for rank in ranks}
    names = sorted(parts, key=lambda name: file_rank(torch.empty(0, dtype=reader.dtype(name))))
    for name in names:
        for rank, box in parts[name]:
            if rank in pieces:
                content = torch.empty(box.shape, dtype=reader.dtype(name), device="meta")
                pieces[rank].append(Slice(name, reader.shape(name), box.offset, content))
    with ExitStack() as stack:
        writers = {}
        for rank, held in pieces.items():
            metadata = {"rank": str(rank), "step": str(reader.step)}
            headed = [(key_of(piece), piece.tensor) for piece in held]
            writers[rank] = stack.enter_context(TensorWriter(aside / rank_file(rank), headed, metadata, disk))
        for number, name in enumerate(names, start=1):
            _write_parts(reader, name, [(writers[rank], box) for rank, box in parts[name] if rank in writers])
            progress(number, len(names))
    for rank, held in pieces.items():
        write_note(aside, rank, held, writers[rank].digests, disk)


def _write_parts(reader: CheckpointReader, name: str, parts: Sequence[tuple[TensorWriter, Box]]) -> None:
    """Parts of one tensor, each to its file; nothing of it is held afterwards."""
    shape, dtype = reader.shape(name), reader.dtype(name)
    views = [Slice(name, shape, box.offset, torch.empty(box.shape, dtype=dtype)) for _, box in parts]
    reader.fill(views)
    for (writer, _), view in zip(parts, views, strict=True):
        writer.write(key_of(view), view.tensor)
