"""Writers with one bug each, to show that the simulated crashes would see it.

Most bugs are disks that do not do what they are told, or later; the others are steps of the writer put wrong. Each is
what somebody might really write; all of them pass as long as nothing crashes, unless it says otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

from janus_mega.checkpoint import manager, retention
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.format import MANIFEST_FILE
from tests.support.crash_disk import Through
from tests.support.crash_rules import STEP_NAME


def is_step(path: Path) -> bool:
    """Whether a path is the final name of a checkpoint, not one being written."""
    return bool(STEP_NAME.fullmatch(path.name)) and not path.parent.name.startswith(".")


def is_aside(path: Path) -> bool:
    """Whether a path is that of a checkpoint being written."""
    return bool(STEP_NAME.fullmatch(path.name)) and path.parent.name.startswith(".")


class FileNeverSynced(Through):
    """Leaves out the fsync of files whose name begins so."""

    def __init__(self, inner: Disk, name: str) -> None:
        super().__init__(inner)
        self._name = name

    def sync_file(self, file: BinaryIO) -> None:
        if not Path(file.name).name.startswith(self._name):
            super().sync_file(file)


class DirectoryNeverSynced(Through):
    """Leaves out the fsync of directories."""

    def __init__(self, inner: Disk, which: Callable[[Path], bool]) -> None:
        super().__init__(inner)
        self._which = which

    def sync_directory(self, path: Path) -> None:
        if not self._which(path):
            super().sync_directory(path)


class ManifestSyncedAfterRename(Through):
    """Publishes first, then makes the manifest's bytes durable."""

    _late: BinaryIO | None = None

    def sync_file(self, file: BinaryIO) -> None:
        if Path(file.name).name == MANIFEST_FILE:
            self._late = file
        else:
            super().sync_file(file)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if is_step(target) and self._late is not None:
            self.inner.sync_file(self._late)


class AsideSyncedAfterRename(Through):
    """Publishes first, then makes the names in the published directory durable."""

    def sync_directory(self, path: Path) -> None:
        if not is_aside(path):
            super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if is_step(target):
            super().sync_directory(target)


class WrittenInPlace(Through):
    """Gives the directory its final name at once, so that the manifest alone says that it is whole."""

    def _moved(self, path: Path) -> Path:
        for above in (path, *path.parents):
            if is_aside(above):
                return above.parent.parent / above.name / path.relative_to(above)
        return path

    def make_directory(self, path: Path) -> None:
        super().make_directory(self._moved(path))
        if is_aside(path):  # what readers of the aside directory look for
            path.symlink_to(self._moved(path))

    def create(self, path: Path) -> BinaryIO:
        return super().create(self._moved(path))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(self._moved(path))

    def remove_file(self, path: Path) -> None:
        super().remove_file(self._moved(path))

    def rename(self, source: Path, target: Path) -> None:
        if is_aside(source):
            source.unlink()
        else:
            super().rename(source, target)


class LastBytesAfterHash(Through):
    """Hands the disk only half of a tensor file's last bytes, after all of them were hashed; nothing need crash."""

    _tensors: int = 0

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        if Path(file.name).name.startswith("tensors-"):
            self._tensors += 1
            if self._tensors == 3:
                content = memoryview(content)[: len(content) // 2]
        super().write(file, content)


class OldOneRemovedBeforePublishing(Through):
    """Makes room by removing what stands under other step names, then publishes."""

    def rename(self, source: Path, target: Path) -> None:
        if is_step(target):
            for old in sorted(target.parent.glob("step-*")):
                self.remove_tree(old)
        super().rename(source, target)


class RemovalNeverSynced(Through):
    """Leaves out every fsync between taking a checkpoint's name away and removing its files."""

    _skip = False

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._skip = is_step(source)

    def sync_directory(self, path: Path) -> None:
        if not self._skip:
            super().sync_directory(path)

    def remove_file(self, path: Path) -> None:
        self._skip = False
        super().remove_file(path)


class RemovedBeforeRename(Through):
    """Swaps what retention does: the files go first, then the name."""

    def rename(self, source: Path, target: Path) -> None:
        if is_step(source):
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                self.remove_file(file)
        super().rename(source, target)


class CopiedOver(Through):
    """Publishes by moving the files one by one into a directory with the final name."""

    def rename(self, source: Path, target: Path) -> None:
        if not is_step(target):
            super().rename(source, target)
            return
        super().make_directory(target)
        for path in sorted(source.iterdir()):
            super().rename(path, target / path.name)
        super().sync_directory(target)
        super().remove_directory(source)


@contextmanager
def rank_left_out() -> Iterator[None]:
    """The manifest does not list the file of the last rank."""
    write = manager.write_manifest

    def without_last(*args: Any, **fields: Any) -> None:
        args = tuple(_without(arg) if isinstance(arg, list) else arg for arg in args)
        write(*args, **{name: _without(value) if name == "files" else value for name, value in fields.items()})

    def _without(entries: Any) -> Any:
        names = sorted(entry.name for entry in entries if entry.name.startswith("tensors-"))
        return [entry for entry in entries if entry.name != names[-1]]

    with mock.patch.object(manager, "write_manifest", without_last):
        yield


@contextmanager
def aside_reused() -> Iterator[None]:
    """A save goes on in the directory that an earlier one left, and overwrites what it finds there."""

    def open_aside(mine: Any, aside: Path, disk: Disk) -> None:
        if not aside.is_dir():
            disk.make_directory(aside)

    create = Disk.create

    def overwrite(disk: Disk, path: Path) -> BinaryIO:
        if path.exists():
            disk.remove_file(path)
        return create(disk, path)

    with mock.patch.object(manager, "_open_aside", open_aside), mock.patch.object(Disk, "create", overwrite):
        yield


@contextmanager
def newest_taken_on_trust() -> Iterator[None]:
    """Retention counts checkpoints without looking into them."""
    with mock.patch.object(retention, "find_damage", return_value=None):
        yield


@dataclass(frozen=True, slots=True)
class Bug:
    """One writer with a bug."""

    scene: str
    """Where it must be seen."""
    disk: Callable[[Disk], Disk] = lambda inner: inner
    step: Callable[[], Any] | None = None
    """A context in which a step of the writer is wrong."""
    world_size: int = 1
    shows_without_crash: bool = False
    """Whether what was written is seen to be wrong as soon as it is read."""


BUGS = {
    "tensors never synced": Bug("save", lambda inner: FileNeverSynced(inner, "tensors-")),
    "index never synced": Bug("save", lambda inner: FileNeverSynced(inner, "tensors.json")),
    "state never synced": Bug("save", lambda inner: FileNeverSynced(inner, "state")),
    "an extra file never synced": Bug("save", lambda inner: FileNeverSynced(inner, "tokenizer")),
    "manifest never synced": Bug("save", lambda inner: FileNeverSynced(inner, MANIFEST_FILE)),
    "manifest synced after publishing": Bug("save", ManifestSyncedAfterRename),
    "names never synced": Bug("save", lambda inner: DirectoryNeverSynced(inner, is_aside)),
    "names synced after publishing": Bug("save", AsideSyncedAfterRename),
    "names of extra files never synced": Bug(
        "save", lambda inner: DirectoryNeverSynced(inner, lambda path: path.name == "text_tokenizer")
    ),
    "publishing never synced": Bug(
        "second save", lambda inner: DirectoryNeverSynced(inner, lambda path: path.name == "checkpoints")
    ),
    "run directory never synced": Bug(
        "save", lambda inner: DirectoryNeverSynced(inner, lambda path: path.name == "run")
    ),
    "written in place": Bug("save", WrittenInPlace),
    "last bytes after the hash": Bug("save", LastBytesAfterHash, shows_without_crash=True),
    "published file by file": Bug("save", CopiedOver),
    "removed before publishing": Bug("keep last one", OldOneRemovedBeforePublishing),
    "removed before renaming": Bug("retention", RemovedBeforeRename),
    "renaming of what is removed never synced": Bug("retention", RemovalNeverSynced),
    "rank left out of the manifest": Bug("save", step=rank_left_out, world_size=2, shows_without_crash=True),
    "aside directory reused": Bug("killed and again", step=aside_reused, shows_without_crash=True),
    "resharded tensors never synced": Bug("reshard", lambda inner: FileNeverSynced(inner, "tensors-")),
    "export never synced": Bug("export", lambda inner: FileNeverSynced(inner, "shard-")),
    "export's name never synced": Bug(
        "export", lambda inner: DirectoryNeverSynced(inner, lambda path: path.name == "exported")
    ),
    "newest taken on trust": Bug("newest damaged", step=newest_taken_on_trust),
}
"""By name."""
