"""Finding the checkpoint to go on from, by all ranks together, and knowing when there must have been one.

Every rank hashes its share of the files, so the content of a large checkpoint is verified as fast as all ranks read it,
and all of them take the same one. Rank 0 alone lists directories: shared file systems show new names to hosts at
different times.

A folder that ever held a checkpoint says so in a file of its own. So an attempt that was ended before its first
checkpoint may be followed by one that begins at step 0, and a folder whose checkpoints are lost may not.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import list_claims
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.format import UnknownSchema, find_file_damage, find_table_damage, read_manifest
from janus_mega.checkpoint.manager import find_step_damage, list_checkpoints

_log = logging.getLogger(__name__)

PUBLISHED_FILE = ".published"
"""In the folder of a run's checkpoints: a checkpoint has been here."""


def _own(content: bytes) -> bytes:
    return content


@dataclass(frozen=True, slots=True)
class Seekers:
    """Who looks together."""

    rank: int = 0
    world_size: int = 1
    agree: Callable[[bool], bool] = bool
    """Whether all ranks say True. Collective over: all that look."""
    share: Callable[[bytes], bytes] = _own
    """What rank 0 gives, on every rank. Collective over: all that look."""


def find_newest(
    root: Path,
    seekers: Seekers,
    accept: Callable[[int], bool] = lambda step: True,
    passed_over: set[str] | None = None,
) -> Path | None:
    """The newest checkpoint that verifies in full, or None; every damaged one passed over is logged with the reason.

    Args:
        root: directory of all checkpoints of a run.
        seekers: who looks.
        accept: which steps will do; the others are passed over in silence.
        passed_over: receives the names of damaged ones.

    Raises:
        UnknownSchema: a newer version wrote the newest; going on from an older one would lose its work.
        Collective over: the seekers.
    """
    names = [entry.path.name for entry in list_checkpoints(root) if accept(entry.step)] if seekers.rank == 0 else []
    for name in reversed(json.loads(seekers.share(json.dumps(names).encode()))):
        damage = _damage_of(root / name, seekers)
        if damage is not None:
            _log.warning("passing over a damaged checkpoint: %s", damage)
        if seekers.agree(damage is None):
            return root / name
        if passed_over is not None:
            passed_over.add(name)
    return None


def _damage_of(path: Path, seekers: Seekers) -> str | None:
    """What this rank finds: rank 0 in names, sizes and tables, every rank in the content of its share of the files."""
    try:
        manifest = read_manifest(path)
        if seekers.rank == 0:
            entry = next(entry for entry in list_checkpoints(path.parent) if entry.path == path)
            damage = find_step_damage(entry, content=False) or find_table_damage(path, manifest)
            if damage is not None:
                return damage
        for name in sorted(manifest["files"])[seekers.rank :: seekers.world_size]:
            damage = find_file_damage(path, manifest, name)
            if damage is not None:
                return damage
    except UnknownSchema:
        raise
    except (UserError, OSError, StopIteration) as error:
        return str(error) or f"{path}: is gone"
    return None


def note_published(root: Path, disk: Disk = DISK) -> None:
    """Keeps that the folder has held a checkpoint."""
    try:
        disk.create(root / PUBLISHED_FILE).close()
    except FileExistsError:
        return
    disk.sync_directory(root)


def why_not_from_scratch(root: Path, trained: Path) -> str | None:
    """Why a run that finds no good checkpoint must not begin at step 0 here, or None if nothing was ever saved.

    Args:
        root: directory of all checkpoints of the run.
        trained: a file that exists once a step was made.
    """
    if list_checkpoints(root):
        return "none of its checkpoints is whole"
    if (root / PUBLISHED_FILE).exists():
        return "it has held checkpoints, and now holds none"
    if trained.exists() and not list_claims(root):
        return f"it was trained in ({trained.name} is there), and its checkpoints are not"
    return None
