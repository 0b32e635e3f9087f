"""Attempts take a checkpoint folder over from each other: the newest may publish, older ones no longer can.

An attempt owns a folder of its own below the root, writes there and publishes by renaming out of it. The next attempt
takes that folder away by renaming it, so whatever an older process that is still alive does next (make a directory,
write a new file, publish, remove an old checkpoint) fails because its path is gone. There is no look whether one is
still the newest followed by a rename: between the two another attempt could come.

Names carry a random part, so a path never comes back. Of two attempts with one number, the higher random part counts as
the newer: each makes its folder before it looks for others, so at least one of the two sees the other.
"""

import json
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.format import MANIFEST_FILE, TRASH_PREFIX

_log = logging.getLogger(__name__)
_ATTEMPT_DIR = re.compile(r"\.attempt-(\d{4,})-([0-9a-f]{8})")
_TOKEN_BITS = 31


class Superseded(RuntimeError):
    """A newer attempt has taken the checkpoint folder over; this process can publish nothing any more."""


@dataclass(frozen=True, slots=True, order=True)
class Claim:
    """The right of one attempt to publish under a root, until a newer attempt claims it."""

    number: int
    """Attempt, from 1; 0 is who saves without having claimed."""
    token: int
    """Random, so that no two attempts ever have one path."""
    root: Path

    @property
    def directory(self) -> Path:
        """Where the attempt writes; gone once it is fenced."""
        return self.root / f".attempt-{self.number:04d}-{self.token:08x}"

    @property
    def key(self) -> int:
        """The claim as one integer below 2^62, for rank 0 to broadcast; see `from_key`."""
        return (self.number << _TOKEN_BITS) | self.token

    @classmethod
    def from_key(cls, root: Path, key: int) -> "Claim":
        """The claim that another rank made."""
        return cls(key >> _TOKEN_BITS, key & ((1 << _TOKEN_BITS) - 1), Path(root))

    def check(self) -> None:
        """Raises Superseded if the claim is fenced. Good for an early end, never for deciding to publish."""
        if not self.directory.is_dir():
            newer = [other.number for other in list_claims(self.root) if other > self]
            by = f"attempt {max(newer)} has" if newer else "somebody has"
            raise Superseded(f"{self.root}: {by} taken over from attempt {self.number}, which publishes nothing more")


def unclaimed(root: Path) -> Claim:
    """For one process at a time that saves into a folder of its own; any attempt that claims the folder fences it."""
    return Claim(0, 0, Path(root))


def claim(root: Path, number: int | None = None, disk: Disk = DISK) -> Claim:
    """Takes a checkpoint folder over from all older attempts. Rank 0 alone; the others get `Claim.key`.

    Args:
        root: directory of all checkpoints of a run; made if missing.
        number: the attempt; by default one above the highest that is known here.
        disk: where it happens.

    Raises:
        Superseded: a newer attempt has claimed the folder already.
    """
    root = Path(root)
    disk.make_directories(root)
    disk.sync_names_above(root)
    if number is None:
        number = 1 + max((other.number for other in [*list_claims(root), *_published(root)]), default=0)
    mine = Claim(number, secrets.randbits(_TOKEN_BITS), root)
    disk.make_directory(mine.directory)
    disk.sync_directory(root)
    fence_older(mine, disk)
    if any(other > mine for other in list_claims(root)):
        _fence(mine, disk)
    mine.check()
    return mine


def fence_older(mine: Claim, disk: Disk = DISK) -> None:
    """Fences every attempt older than `mine`, and removes what fenced ones left behind."""
    for other in list_claims(mine.root):
        if other < mine:
            _log.info("%s: attempt %d is fenced off by attempt %d", mine.root, other.number, mine.number)
            _fence(other, disk)
    remove_trash(mine.root, disk)


def _fence(other: Claim, disk: Disk) -> None:
    trash = other.root / f"{TRASH_PREFIX}{other.directory.name.removeprefix('.')}"
    try:
        disk.rename(other.directory, trash)
    except FileNotFoundError:  # another attempt was quicker
        return
    disk.sync_directory(other.root)
    _remove(trash, disk)


def remove_trash(root: Path, disk: Disk = DISK) -> None:
    """Removes what is no longer anybody's: fenced attempts, checkpoints whose removal was cut short."""
    for path in sorted(Path(root).glob(f"{TRASH_PREFIX}*")):
        _remove(path, disk)


def _remove(path: Path, disk: Disk) -> None:
    try:
        if path.is_dir() and not path.is_symlink():  # a checkpoint renamed into it must not come back half-removed
            disk.sync_directory(path)
        disk.remove_tree(path)
    except FileNotFoundError:  # two may clean at once
        return
    except OSError as error:  # a process that was fenced may still add a file: next time
        _log.warning("%s: not removed yet: %s", path, error.strerror or error)


def list_claims(root: Path) -> list[Claim]:
    """Claims that are not fenced, oldest first; one, but while attempts race."""
    found = (_ATTEMPT_DIR.fullmatch(path.name) for path in Path(root).iterdir()) if Path(root).is_dir() else ()
    return sorted(Claim(int(match[1]), int(match[2], 16), Path(root)) for match in found if match)


def _published(root: Path) -> list[Claim]:
    """Attempts named by manifests; unverified, for numbering alone."""
    found = []
    for path in root.glob(f"step-*/{MANIFEST_FILE}"):
        try:
            found.append(Claim(int(json.loads(path.read_bytes()).get("attempt", 0)), 0, root))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return found
