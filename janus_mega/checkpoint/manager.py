"""Saving and finding checkpoints of a run.

Every rank calls `save_checkpoint`; communication is the agreement that the caller passes in and the shared directory,
nothing else. A rank that fails still takes part in every agreement, so a full disk on one rank never hangs the others:
the checkpoint is then not published and every rank raises.

The newest checkpoint is found by scanning for directories whose manifests verify. There is no pointer file: it would
be one more thing that can be torn, stale or lost.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import Claim, Superseded, unclaimed
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.format import (
    CONFIG_FILE,
    INDEX_FILE,
    STATE_FILE,
    TRASH_PREFIX,
    FileEntry,
    copy_file,
    dump_compact,
    dump_json,
    find_damage,
    parse_step,
    rank_file,
    refuse_unknown_schema,
    write_bytes,
    write_manifest,
)
from janus_mega.checkpoint.reader import RNG_PREFIX, open_checkpoint
from janus_mega.checkpoint.staging import Snapshot
from janus_mega.checkpoint.state import TrainState
from janus_mega.checkpoint.tensor_file import DTYPE_NAMES, Digests, write_safetensors
from janus_mega.parallel.slices import Box, Slice, check_coverage

_log = logging.getLogger(__name__)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


def _alone(ok: bool) -> bool:
    return ok


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who saves together."""

    rank: int = 0
    world_size: int = 1
    agree: Callable[[bool], bool] = _alone
    """Returns when all ranks have called it, and whether all of them said True. Collective over: all that save."""


ALONE = Ranks()
"""One process that saves for itself."""


@dataclass(frozen=True, slots=True)
class Found:
    """A step directory under a checkpoint root."""

    path: Path
    step: int
    repeat: int
    """0, or the suffix of a directory that was saved again at the same step."""


def save_checkpoint(
    place: Path | Claim,
    slices: Iterable[Slice],
    state: TrainState,
    *,
    ranks: Ranks = ALONE,
    extra_files: Mapping[str, bytes | Path] | None = None,
    about: Mapping[str, Any] | None = None,
    disk: Disk = DISK,
) -> Path:
    """Writes one checkpoint and returns its directory. Collective: every rank, through `ranks.agree`.

    Rank 0 has the directory's name from the disk. On another rank, where a cached listing may not show it yet, it is
    the name that the step has when it is saved once.

    Args:
        place: the claim on the directory of all checkpoints of a run, shared by all ranks; or a directory that no two
            processes save into at once.
        slices: what this rank owns; over all ranks each element of each tensor exactly once.
        state: where the run stands; `rng` is this rank's, the rest is taken from rank 0.
        ranks: who saves.
        extra_files: further files by relative name (tokenizers, ...), content or a path to copy; rank 0's are taken.
        about: JSON values for the manifest beside what it always tells: layout, commit, ...; rank 0's are taken.
        disk: where it happens.

    Raises:
        ValueError: pieces overlap or are missing (names tensor and range), or are too many to be read again.
        OSError: writing failed, here or on another rank; nothing was published.
        Superseded: a newer attempt has claimed the directory; nothing was published.
    """
    mine = place if isinstance(place, Claim) else unclaimed(place)
    aside = mine.directory / f"step-{state.step:08d}"
    is_first = ranks.rank == 0
    facts = {**(about or {}), "attempt": mine.number, "step": state.step, "world_size": ranks.world_size}
    phases = (
        lambda: _open_aside(mine, aside, disk) if is_first else None,
        lambda: _write_rank(aside, slices, state, ranks.rank, disk),
        lambda: _join(aside, state, facts, extra_files or {}, disk) if is_first else None,
        lambda: _publish(mine, aside, state.step, disk) if is_first else None,
    )
    for phase in phases:
        failure: Exception | None = None
        try:
            phase()
        except Exception as error:  # told after the agreement, or the other ranks would wait for ever
            failure = error
        if not ranks.agree(failure is None):
            _give_up(mine, aside, failure, is_first, disk)
    saved = _seen_at_step(mine.root, state.step, is_first)
    if not saved and not is_first:
        return mine.root / aside.name
    if not saved:  # a newer attempt took over meanwhile and has gone on so far that this one is superfluous
        mine.check()
        raise FileNotFoundError(f"{mine.root}: the checkpoint of step {state.step} was published and is gone")
    return saved[-1].path


def _seen_at_step(root: Path, step: int, is_first: bool) -> list[Found]:
    """What a rank sees of a step just published; only the one that renamed it is sure to, as listings are cached."""
    try:
        return _at_step(root, step)
    except OSError:
        if is_first:
            raise
        return []


def save_files(
    root: Path,
    write: Callable[[Path], None],
    state: TrainState,
    *,
    extra_files: Mapping[str, bytes | Path],
    about: Mapping[str, Any],
    disk: Disk = DISK,
) -> Path:
    """Publishes a checkpoint whose tensor files one process writes for all ranks; returns its directory.

    Args:
        root: a directory that no two processes save into at once.
        write: makes the file and the note (`write_note`) of every rank in the directory it is given.
        state: where the run stood; generators apart, which are tensors here.
        extra_files: as in `save_checkpoint`.
        about: the manifest's JSON values, `world_size` (files of tensors) among them.
        disk: where it happens.

    Raises:
        ValueError: pieces overlap or are missing (names tensor and range).
        OSError: writing failed; nothing was published.
    """
    mine = unclaimed(root)
    aside = mine.directory / f"step-{state.step:08d}"
    try:
        _open_aside(mine, aside, disk)
        write(aside)
        _join(aside, state, {**about, "attempt": 0, "step": state.step}, extra_files, disk)
        _publish(mine, aside, state.step, disk)
    except Exception as error:
        _give_up(mine, aside, error, True, disk)
    return _at_step(mine.root, state.step)[-1].path


def _give_up(mine: Claim, aside: Path, failure: Exception | None, is_first: bool, disk: Disk) -> None:
    """Makes room again, as the disk may be full, and raises."""
    if is_first:
        with suppress(OSError):
            disk.remove_tree(aside)
    if mine.number:
        try:
            mine.check()
        except Superseded as superseded:
            raise superseded from failure
    if failure is not None:
        raise failure
    raise OSError(f"{mine.root}: {aside.name} was not saved, because another rank failed; see its log")


def _open_aside(mine: Claim, aside: Path, disk: Disk) -> None:
    if mine.number == 0:
        disk.make_directories(mine.directory)
        disk.sync_names_above(mine.root)
    for left_over in sorted(mine.directory.iterdir()):  # of saves that failed or were killed
        _clear(left_over, aside, disk)
    disk.make_directory(aside)


def _clear(left_over: Path, aside: Path, disk: Disk) -> None:
    """Removes what a save has left. What cannot go, as somebody has it open, stays, but must not be in the way."""
    try:
        disk.remove_tree(left_over)
    except OSError as error:
        if left_over.name.startswith(TRASH_PREFIX):
            return  # it was told when it got this name
        _log.warning("%s: left over from a save and not removed yet: %s", left_over, error.strerror or error)
        if left_over == aside:
            disk.rename(aside, aside.with_name(f"{TRASH_PREFIX}{aside.name}-{secrets.token_hex(4)}"))


def _write_rank(aside: Path, slices: Iterable[Slice], state: TrainState, rank: int, disk: Disk) -> None:
    """Writes the tensors of one rank, and a note for rank 0 that says which."""
    pieces = list(slices)
    for name, tensor in state.rng.items():
        shape = tuple(tensor.shape)
        pieces.append(Slice(f"{RNG_PREFIX}{rank:05d}/{name}", shape, (0,) * len(shape), tensor))
    keys = [key_of(piece) for piece in pieces]
    tensors = [(key, piece.tensor) for key, piece in zip(keys, pieces, strict=True)]
    metadata = {"rank": str(rank), "step": str(state.step)}
    numbers = {key: number for number, key in enumerate(keys)}
    written = (lambda key: slices.written(numbers[key])) if isinstance(slices, Snapshot) else None
    digests = write_safetensors(aside / rank_file(rank), tensors, metadata, disk, written)
    write_note(aside, rank, pieces, digests, disk)


def key_of(piece: Slice) -> str:
    """What a piece is called in its file."""
    return f"{piece.name}@{','.join(map(str, piece.offset))}"


def write_note(aside: Path, rank: int, pieces: Iterable[Slice], digests: Digests, disk: Disk) -> None:
    """Tells rank 0 what the file of a rank holds; only name, place, shape and format of pieces are looked at."""
    entry = FileEntry(rank_file(rank), digests.num_bytes, digests.tree, is_tree=True)
    rows = [
        {
            "name": piece.name,
            "dtype": DTYPE_NAMES[piece.tensor.dtype],
            "global_shape": piece.global_shape,
            "key": key_of(piece),
            "offset": piece.offset,
            "shape": tuple(piece.tensor.shape),
            "sha256": digests.tensors[key_of(piece)].hex(),
        }
        for piece in pieces
    ]
    note = dump_compact({"file": asdict(entry), "pieces": rows})
    with disk.create(aside / _note(rank)) as file:  # rank 0 reads it in a moment; it need not outlive the machine
        disk.write(file, note)
    disk.sync_directory(aside)


def _note(rank: int) -> str:
    return f".note-{rank:05d}.json"


def _join(
    aside: Path,
    state: TrainState,
    facts: Mapping[str, Any],
    extra_files: Mapping[str, bytes | Path],
    disk: Disk,
) -> None:
    """Joins the ranks' notes into index and manifest."""
    world_size = facts["world_size"]
    notes = [json.loads((aside / _note(rank)).read_bytes()) for rank in range(world_size)]
    index = _build_index(notes)
    entries = [FileEntry(**note["file"]) for note in notes]
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    config = fields.pop("config_text").encode()
    del fields["rng"]
    entries.append(write_bytes(aside / INDEX_FILE, dump_compact(index), disk=disk))
    entries.append(write_bytes(aside / STATE_FILE, dump_json(fields), disk=disk))
    entries.append(write_bytes(aside / CONFIG_FILE, config, disk=disk))
    entries += [_write_extra(aside, name, content, disk) for name, content in extra_files.items()]
    for rank in range(world_size):
        disk.remove_file(aside / _note(rank))
    digests = {"config_sha256": hashlib.sha256(config).hexdigest(), "plan_digest": state.plan_digest}
    write_manifest(aside, {**facts, **digests}, entries, disk)
    disk.sync_directory(aside)


def _publish(mine: Claim, aside: Path, step: int, disk: Disk) -> None:
    """Gives the directory its name: the one operation that makes a checkpoint, and that a fenced attempt cannot do."""
    earlier = _at_step(mine.root, step)
    repeat = earlier[-1].repeat + 1 if earlier else 0
    while True:
        try:
            disk.rename(aside, mine.root / (f"step-{step:08d}-{repeat}" if repeat else f"step-{step:08d}"))
            break
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            repeat += 1  # an older attempt was just not fenced yet
    disk.sync_directory(mine.root)
    if mine.number:
        disk.sync_directory(mine.directory)
        return
    try:
        disk.remove_directory(mine.directory)
    except OSError as error:
        if error.errno not in _OCCUPIED:  # by what could not be removed; the checkpoint is published all the same
            raise


def _build_index(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of all tensors from the ranks' notes; raises ValueError unless each is covered exactly once."""
    index: dict[str, Any] = {}
    for note in notes:
        for row in note["pieces"]:
            name, dtype, shape = row.pop("name"), row.pop("dtype"), row.pop("global_shape")
            entry = index.setdefault(name, {"shape": shape, "dtype": dtype, "pieces": []})
            if entry["shape"] != shape or entry["dtype"] != dtype:
                raise ValueError(f"{name}: ranks disagree, {entry['dtype']} {entry['shape']} and {dtype} {shape}")
            entry["pieces"].append({**row, "file": note["file"]["name"]})
    for name, entry in index.items():
        boxes = [Box(tuple(piece["offset"]), tuple(piece["shape"])) for piece in entry["pieces"]]
        check_coverage(name, entry["shape"], boxes)
    return index


def _write_extra(aside: Path, name: str, content: bytes | Path, disk: Disk) -> FileEntry:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"extra file {name!r}: must be a relative name inside the checkpoint")
    path = aside / relative
    for above in reversed(relative.parents[:-1]):  # never `aside` itself: a fenced attempt's folder must not come back
        if not (aside / above).is_dir():
            disk.make_directory(aside / above)
            disk.sync_directory((aside / above).parent)
    if isinstance(content, Path):
        entry = copy_file(content, path, str(relative), disk)
    else:
        entry = write_bytes(path, content, str(relative), disk)
    disk.sync_directory(path.parent)
    return entry


def list_checkpoints(root: Path) -> list[Found]:
    """Published step directories, oldest first, unverified; empty when `root` does not exist."""
    found = []
    if Path(root).is_dir():
        for path in Path(root).iterdir():
            parsed = parse_step(path.name)
            if parsed is not None:
                found.append(Found(path, *parsed))
    return sorted(found, key=lambda entry: (entry.step, entry.repeat))


def _at_step(root: Path, step: int) -> list[Found]:
    return [entry for entry in list_checkpoints(root) if entry.step == step]


def find_latest(root: Path, accept: Callable[[int], bool] = lambda step: True) -> Path | None:
    """The newest checkpoint that verifies in full, or None; every damaged one passed over is logged with the reason.

    Args:
        root: directory of all checkpoints of a run.
        accept: which steps will do; the others are passed over in silence.

    Raises:
        UnknownSchema: another version wrote the newest; what it saved is not given up in silence.
    """
    for entry in reversed([entry for entry in list_checkpoints(root) if accept(entry.step)]):
        damage = find_damage(entry.path)
        if damage is None:
            return entry.path
        refuse_unknown_schema(entry.path)
        _log.warning("passing over a damaged checkpoint: %s", damage)
    return None


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
