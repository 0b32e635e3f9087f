"""Every change that checkpoints make to a disk, one method per operation that a crash can fall on.

Saving, retention, resharding and exports take a `Disk` and change files through nothing else. So a test hands in one
that records, dies, runs full or answers slowly, and sees the very operations of a real save, not an imitation of them.
Reading is not here: it changes nothing.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

DIRECTORY_MODE = 0o750
"""Permissions of directories: weights are for their owner and group."""


class Disk:
    """The operating system's own operations."""

    def make_directory(self, path: Path) -> None:
        """Makes one directory; FileExistsError if it is there."""
        path.mkdir(mode=DIRECTORY_MODE)

    def create(self, path: Path) -> BinaryIO:
        """Opens a new file for unbuffered writing; FileExistsError if it is there. The caller closes it."""
        return cast(BinaryIO, path.open("xb", buffering=0))

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        """Appends all of `content` (a memoryview of bytes)."""
        rest = memoryview(content)
        while rest:  # one call to the system writes 2 GiB at most, and less on a disk that has just run full
            rest = rest[file.write(rest) :]

    def sync_file(self, file: BinaryIO) -> None:
        """Makes a file's content durable."""
        os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        """Makes the names inside a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Gives a file or directory another name, atomically."""
        source.rename(target)

    def remove_file(self, path: Path) -> None:
        """Removes a file or a link."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Removes an empty directory."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Removes a directory with all it holds; links are removed, never followed. Made of the methods above."""
        if path.is_symlink() or not path.is_dir():
            self.remove_file(path)
            return
        for inner in sorted(path.iterdir()):
            self.remove_tree(inner)
        self.remove_directory(path)

    def make_directories(self, path: Path) -> None:
        """Makes a directory and what is missing above it, durably. Made of the methods above."""
        if path.is_dir():
            return
        self.make_directories(path.parent)
        try:
            self.make_directory(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        self.sync_directory(path.parent)

    def sync_names_above(self, path: Path) -> None:
        """Makes the name of a directory and of all above it durable, whoever made them; where one may not, it is left.

        A run directory that something else has just made would be lost in a power failure with all that lies in it.
        """
        for above in path.absolute().parents:
            with suppress(PermissionError):
                self.sync_directory(above)


DISK = Disk()
"""The real one."""
