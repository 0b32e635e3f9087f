"""Finding the checkpoint to go on from, by all ranks together, and knowing when there must have been one.

Every rank hashes its share of the files, so the content of a large checkpoint is verified as fast as all ranks read it,
and all of them take the same one. Rank 0 alone lists directories: shared file systems show new names to hosts at
different times. For the same reason a file that one rank cannot read is looked at again before it counts as damaged:
the fault of a moment on one host must not cost all of them the newest checkpoint.

A folder that ever held a checkpoint says so in a file of its own. So an attempt that was ended before its first
checkpoint may be followed by one that begins at step 0, and a folder whose checkpoints are lost may not.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import list_claims
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.format import UnknownSchema, check_directory, check_file, check_table, read_manifest
from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.tensor_file import Unreadable

T = TypeVar("T")

_log = logging.getLogger(__name__)

PUBLISHED_FILE = ".published"
"""In the folder of a run's checkpoints: a checkpoint has been here."""
_LOOK_AGAIN_S = (0.5, 2.0)
"""Pauses after which what could not be read is looked at again."""


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
        manifest = read_patiently(lambda: read_manifest(path))
        if seekers.rank == 0:
            read_patiently(lambda: check_directory(path, content=False))
            read_patiently(lambda: check_table(path, manifest))
        for name in sorted(manifest["files"])[seekers.rank :: seekers.world_size]:
            read_patiently(partial(check_file, path, manifest, name))
    except UnknownSchema:
        raise
    except (UserError, OSError) as error:
        return str(error)
    return None


def read_patiently(read: Callable[[], T]) -> T:
    """What `read` gives; where the system refuses a file, it is called again after a pause, and then once more.

    Raises:
        UserError: as `read`; `Unreadable` if the file is still refused.
        OSError: as `read`, still.
    """
    for pause_s in _LOOK_AGAIN_S:
        try:
            return read()
        except (Unreadable, OSError) as error:
            _log.info("looking again in %g s: %s", pause_s, error)
        time.sleep(pause_s)
    return read()


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
