"""Which checkpoints stay, their removal, and whether the disk has room for them.

Nothing goes unless one checkpoint, the anchor, is known to be good: what was just written, or else the newest, read
again. Only what is older than it and than the newest whole ones goes, so the last good checkpoint is never touched, and
damaged ones above the anchor stay for inspection and keep nothing from being removed. Removal begins with a rename, so
a half-removed directory is never taken for a checkpoint; an attempt renames into its own folder, so a fenced one
removes none.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import Claim, fence_older, remove_trash
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.format import TRASH_PREFIX, find_damage
from janus_mega.checkpoint.manager import Found, list_checkpoints


def apply_retention(
    place: Path | Claim,
    keep_last: int,
    keep_every: int = 0,
    *,
    written: Path | None = None,
    bad: Collection[str] = (),
    disk: Disk = DISK,
) -> list[Path]:
    """Removes all but the newest `keep_last` whole checkpoints and those kept for good; rank 0, after a save.

    Args:
        place: the claim of this attempt, or a directory of checkpoints that nobody claims.
        keep_last: how many of the newest whole ones stay, at least 1.
        keep_every: checkpoints whose step is a multiple of it stay too; 0 for none.
        written: what this process has just saved. Its content is not read again: the digests in it are of what was
            handed to the disk a moment ago. Checkpoints above it are left alone and do not count.
        bad: names of checkpoints whose content was found damaged; they do not count as whole and stay.
        disk: where it happens.

    Returns:
        The directories that went.

    Raises:
        UserError: `keep_last` below 1.
        Superseded: a newer attempt has claimed the directory.
    """
    if keep_last < 1:
        raise UserError(f"checkpoint.keep_last {keep_last}: at least one checkpoint must stay; set it to 1 or more")
    root = place.root if isinstance(place, Claim) else Path(place)
    if isinstance(place, Claim):
        place.check()
        fence_older(place, disk)
    else:
        remove_trash(root, disk)
    found = [entry for entry in list_checkpoints(root) if entry.path.name not in bad]
    paths = [entry.path for entry in found]
    if written in paths:
        found = found[: paths.index(written) + 1]
    if not found or find_damage(found[-1].path, content=found[-1].path != written) is not None:
        return []
    removed = []
    try:
        for entry in _superfluous(found, keep_last, keep_every):
            _remove(entry, place, disk)
            removed.append(entry.path)
    except FileNotFoundError:
        if isinstance(place, Claim):
            place.check()
        raise
    return removed


def _superfluous(found: list[Found], keep_last: int, keep_every: int) -> list[Found]:
    """Checkpoints older than the newest `keep_last` whole ones and not kept for good, newest first."""
    whole, superfluous = 0, []
    for entry in reversed(found):
        if whole < keep_last:
            whole += find_damage(entry.path, content=False) is None
        elif not keep_every or entry.step % keep_every:
            superfluous.append(entry)
    return superfluous


def _remove(entry: Found, place: Path | Claim, disk: Disk) -> None:
    folder = place.directory if isinstance(place, Claim) else entry.path.parent
    trash = folder / f"{TRASH_PREFIX}{entry.path.name}"
    disk.rename(entry.path, trash)
    for side in dict.fromkeys((folder, entry.path.parent)):  # before any file goes, the name must be gone for good
        disk.sync_directory(side)
    disk.remove_tree(trash)


def check_space(root: Path, bytes_of_one: int, keep_last: int) -> None:
    """Makes sure that the disk has room for what retention keeps and for the one being written; before the first step.

    Args:
        root: directory of all checkpoints of a run; need not exist. What it holds already counts.
        bytes_of_one: size of one checkpoint over all ranks.
        keep_last: how many stay.

    Raises:
        UserError: there is too little; names what is needed, what is free and the remedy.
    """
    existing = Path(root).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    held = min(len(list_checkpoints(root)), keep_last)
    needed = (keep_last + 1 - held) * bytes_of_one
    if free < needed:
        raise UserError(
            f"{root}: {needed / 2**30:.2f} GiB are needed for {keep_last + 1 - held} more checkpoints of "
            f"{bytes_of_one / 2**30:.2f} GiB (checkpoint.keep_last {keep_last} and the one being written), "
            f"{free / 2**30:.2f} GiB are free; lower checkpoint.keep_last, make room or choose another run_dir"
        )
