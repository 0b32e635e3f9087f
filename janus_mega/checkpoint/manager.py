"""Saving, finding and pruning checkpoints of a run.

Every rank calls `save_checkpoint`; communication is the barrier that the caller passes in and the shared directory,
nothing else. A rank that fails still passes every barrier, so a full disk on one rank never hangs the others: the
checkpoint is then not published and every rank raises.

The newest checkpoint is found by scanning for directories whose manifests verify. There is no pointer file: it would
be one more thing that can be torn, stale or lost.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.format import (
    CONFIG_FILE,
    DTYPE_NAMES,
    INDEX_FILE,
    STATE_FILE,
    FileEntry,
    copy_file,
    dump_json,
    find_damage,
    rank_file,
    sync_directory,
    write_bytes,
    write_manifest,
    write_safetensors,
)
from janus_mega.checkpoint.reader import RNG_PREFIX, open_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.parallel.slices import Box, Slice, check_coverage

_log = logging.getLogger(__name__)
_STEP_DIR = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_ASIDE = ".aside-step-"
_TRASH = ".trash-"


@dataclass(frozen=True, slots=True)
class Found:
    """A step directory under a checkpoint root."""

    path: Path
    step: int
    attempt: int
    """0, or the suffix of a directory that was saved again at the same step."""


def save_checkpoint(
    root: Path,
    slices: Iterable[Slice],
    state: TrainState,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    extra_files: Mapping[str, bytes | Path] | None = None,
) -> Path:
    """Writes one checkpoint under `root` and returns its directory. Collective: every rank, through `barrier`.

    Args:
        root: directory of all checkpoints of a run, shared by all ranks.
        slices: what this rank owns; over all ranks each element of each tensor exactly once.
        state: where the run stands; `rng` is this rank's, the rest is taken from rank 0.
        rank: this process.
        world_size: processes that save.
        barrier: returns when all ranks have called it.
        extra_files: further files by relative name (tokenizers, ...), content or a path to copy; rank 0's are taken.

    Raises:
        ValueError: pieces overlap or are missing (names tensor and range).
        OSError: writing failed; nothing was published.
    """
    root = Path(root)
    aside = root / f"{_ASIDE}{state.step:08d}"
    failure: Exception | None = None
    phases = (
        lambda: _open_aside(root, aside) if rank == 0 else None,
        lambda: _write_rank(aside, slices, state, rank),
        lambda: _publish(root, aside, state, world_size, extra_files or {}) if rank == 0 else None,
    )
    for phase in phases:
        if failure is None:
            try:
                phase()
            except Exception as error:  # told after the barriers, or the other ranks would wait for ever
                failure = error
        barrier()
    if failure is not None:
        raise failure
    if aside.exists() or not (found := _at_step(root, state.step)):
        raise OSError(f"{root}: step {state.step} was not saved, because another rank failed; see its log")
    return found[-1].path


def _open_aside(root: Path, aside: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(f"{_ASIDE}*"):  # of saves that were killed
        shutil.rmtree(left_over)
    aside.mkdir()


def _write_rank(aside: Path, slices: Iterable[Slice], state: TrainState, rank: int) -> None:
    """Writes the tensors of one rank, and a note for rank 0 that says which."""
    pieces = list(slices)
    for name, tensor in state.rng.items():
        shape = tuple(tensor.shape)
        pieces.append(Slice(f"{RNG_PREFIX}{rank:05d}/{name}", shape, (0,) * len(shape), tensor))
    keys = [f"{piece.name}@{','.join(map(str, piece.offset))}" for piece in pieces]
    tensors = [(key, piece.tensor) for key, piece in zip(keys, pieces, strict=True)]
    entry = write_safetensors(aside / rank_file(rank), tensors, {"rank": str(rank), "step": str(state.step)})
    rows = [
        [piece.name, DTYPE_NAMES[piece.tensor.dtype], piece.global_shape, key, piece.offset, tuple(piece.tensor.shape)]
        for key, piece in zip(keys, pieces, strict=True)
    ]
    write_bytes(aside / _note(rank), dump_json({"file": asdict(entry), "pieces": rows}))


def _note(rank: int) -> str:
    return f".note-{rank:05d}.json"


def _publish(
    root: Path, aside: Path, state: TrainState, world_size: int, extra_files: Mapping[str, bytes | Path]
) -> None:
    """Joins the ranks' notes into index and manifest, and gives the directory its name."""
    missing = [rank for rank in range(world_size) if not (aside / _note(rank)).exists()]
    if missing:
        raise OSError(f"{root}: step {state.step} was not saved, rank(s) {missing} wrote nothing; see their logs")
    notes = [json.loads((aside / _note(rank)).read_bytes()) for rank in range(world_size)]
    index = _build_index(notes)
    entries = [FileEntry(**note["file"]) for note in notes]
    fields = asdict(state)
    config_text = fields.pop("config_text")
    del fields["rng"]
    entries.append(write_bytes(aside / INDEX_FILE, dump_json(index)))
    entries.append(write_bytes(aside / STATE_FILE, dump_json(fields)))
    entries.append(write_bytes(aside / CONFIG_FILE, config_text.encode()))
    entries += [_write_extra(aside, name, content) for name, content in extra_files.items()]
    for rank in range(world_size):
        (aside / _note(rank)).unlink()
    write_manifest(aside, state.step, world_size, entries)
    sync_directory(aside)
    earlier = _at_step(root, state.step)
    suffix = f"-{earlier[-1].attempt + 1}" if earlier else ""
    os.rename(aside, root / f"step-{state.step:08d}{suffix}")
    sync_directory(root)


def _build_index(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of all tensors from the ranks' notes; raises ValueError unless each is covered exactly once."""
    index: dict[str, Any] = {}
    for note in notes:
        for name, dtype, global_shape, key, offset, shape in note["pieces"]:
            entry = index.setdefault(name, {"shape": global_shape, "dtype": dtype, "pieces": []})
            if entry["shape"] != global_shape or entry["dtype"] != dtype:
                raise ValueError(
                    f"{name}: ranks disagree, {entry['dtype']} {entry['shape']} and {dtype} {global_shape}"
                )
            entry["pieces"].append({"file": note["file"]["name"], "key": key, "offset": offset, "shape": shape})
    for name, entry in index.items():
        boxes = [Box(tuple(piece["offset"]), tuple(piece["shape"])) for piece in entry["pieces"]]
        check_coverage(name, entry["shape"], boxes)
    return index


def _write_extra(aside: Path, name: str, content: bytes | Path) -> FileEntry:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"extra file {name!r}: must be a relative name inside the checkpoint")
    path = aside / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        entry = copy_file(content, path, str(relative))
    else:
        entry = write_bytes(path, content, str(relative))
    sync_directory(path.parent)
    return entry


def list_checkpoints(root: Path) -> list[Found]:
    """Published step directories, oldest first, unverified; empty when `root` does not exist."""
    found = []
    if Path(root).is_dir():
        for path in Path(root).iterdir():
            match = _STEP_DIR.fullmatch(path.name)
            if match:
                found.append(Found(path, int(match[1]), int(match[2] or 0)))
    return sorted(found, key=lambda entry: (entry.step, entry.attempt))


def _at_step(root: Path, step: int) -> list[Found]:
    return [entry for entry in list_checkpoints(root) if entry.step == step]


def find_latest(root: Path, accept: Callable[[int], bool] = lambda step: True) -> Path | None:
    """The newest checkpoint that verifies in full, or None; every damaged one passed over is logged with the reason.

    Args:
        root: directory of all checkpoints of a run.
        accept: which steps will do; the others are passed over in silence.
    """
    for entry in reversed([entry for entry in list_checkpoints(root) if accept(entry.step)]):
        damage = _find_damage(entry, content=True)
        if damage is None:
            return entry.path
        _log.warning("passing over a damaged checkpoint: %s", damage)
    return None


def _find_damage(entry: Found, *, content: bool) -> str | None:
    damage = find_damage(entry.path, content=content)
    if damage is None and open_checkpoint(entry.path, verify=False).step != entry.step:
        return f"{entry.path}: its manifest is of another step; the directory was renamed, use an older one"
    return damage


def apply_retention(root: Path, keep_last: int) -> list[Path]:
    """Removes all but the newest `keep_last` whole checkpoints; call on rank 0 after a save. Returns what went.

    Nothing goes unless the newest verifies in full, and only what is older than `keep_last` whole ones, so the last
    good checkpoint is never touched and damaged newer ones stay for inspection. Removal begins with a rename, so a
    half-removed directory is never taken for a checkpoint.
    """
    if keep_last < 1:
        raise UserError(f"checkpoint.keep_last {keep_last}: at least one checkpoint must stay; set it to 1 or more")
    for path in Path(root).glob(f"{_TRASH}*"):
        shutil.rmtree(path)
    found = list_checkpoints(root)
    if not found or _find_damage(found[-1], content=True) is not None:
        return []
    whole, removed = 0, []
    for entry in reversed(found):
        if whole >= keep_last:
            trash = entry.path.with_name(_TRASH + entry.path.name)
            os.rename(entry.path, trash)
            sync_directory(Path(root))
            shutil.rmtree(trash)
            removed.append(entry.path)
        elif _find_damage(entry, content=False) is None:
            whole += 1
    return removed


def load_state(directory: Path, rank: int = 0) -> TrainState:
    """Where the run stood, with the random generators of `rank` (empty for a rank that did not exist then)."""
    return open_checkpoint(directory).read_state(rank)


def load_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of the model by global name, whole, on the CPU; every touched file is verified."""
    reader = open_checkpoint(directory)
    return {name: reader.read(name) for name in reader.weight_names}


def read_tensor_box(directory: Path, name: str, box: Box) -> Tensor:
    """One box of one tensor; for many reads keep an `open_checkpoint`."""
    return open_checkpoint(directory).read_box(name, box)
