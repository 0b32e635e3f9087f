"""Where the picture of a record lies: beside its file, inside the record, or in a tar."""

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from data_pipeline.prepare.records import Reject

MAX_PICTURE_BYTES = 256 * 1024 * 1024
"""Larger picture files are refused."""


class Pictures(Protocol):
    """Pictures by name."""

    def read(self, name: str) -> bytes:
        """The picture's file.

        Raises:
            Reject: missing_image, too_large, bad_path.
        """
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a picture."""
        ...


@dataclass(frozen=True, slots=True)
class Beside:
    """Pictures below a directory, by relative path."""

    directory: Path

    def read(self, name: str) -> bytes:
        """See Pictures."""
        path = self.directory / safe_relative(name, self.directory)
        try:
            if path.stat().st_size > MAX_PICTURE_BYTES:
                raise Reject("too_large", f"image {name!r} has more than {MAX_PICTURE_BYTES} bytes")
            return path.read_bytes()
        except OSError as error:
            raise Reject("missing_image", f"image {name!r} cannot be read ({error.strerror})") from error

    def has(self, name: str) -> bool:
        """See Pictures."""
        try:
            return (self.directory / safe_relative(name, self.directory)).is_file()
        except (OSError, Reject):
            return False


@dataclass(frozen=True, slots=True)
class Inside:
    """Pictures that came with the record, and where all others are."""

    contents: dict[str, bytes] = field(default_factory=dict)
    others: Pictures | None = None

    def read(self, name: str) -> bytes:
        """See Pictures."""
        content = self.contents.get(name)
        if content is None:
            if self.others is None:
                raise Reject("missing_image", f"image {name!r} is not in the record")
            return self.others.read(name)
        if len(content) > MAX_PICTURE_BYTES:
            raise Reject("too_large", f"image {name!r} has more than {MAX_PICTURE_BYTES} bytes")
        return content

    def has(self, name: str) -> bool:
        """See Pictures."""
        return name in self.contents or (self.others is not None and self.others.has(name))


@dataclass(frozen=True, slots=True)
class InTar:
    """Pictures by the byte ranges of members of a tar."""

    tar: Path
    places: dict[str, tuple[int, int]]
    """Offset and size by name."""

    def read(self, name: str) -> bytes:
        """See Pictures."""
        if name not in self.places:
            raise Reject("missing_image", f"image {name!r} is not in {self.tar.name}")
        return read_range(self.tar, *self.places[name], name)

    def has(self, name: str) -> bool:
        """See Pictures."""
        return name in self.places


def read_range(path: Path, offset: int, size: int, name: str) -> bytes:
    """A picture that is a stretch of a file.

    Raises:
        Reject: missing_image, too_large.
    """
    if size > MAX_PICTURE_BYTES:
        raise Reject("too_large", f"image {name!r} has more than {MAX_PICTURE_BYTES} bytes")
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            content = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Reject("missing_image", f"image {name!r} cannot be read ({error.strerror})") from error
    if len(content) != size:
        raise Reject("missing_image", f"image {name!r} cannot be read ({path.name} ends inside it)")
    return content


def safe_relative(name: str, directory: Path) -> PurePosixPath:
    """The name as a path that stays below the directory.

    Raises:
        Reject: bad_path: it is absolute, has '..', or is a shell command.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise Reject("bad_path", f"image {name!r} must be a path below {directory}")
    if name.startswith("pipe:"):
        raise Reject("bad_path", f"image {name!r} is a shell command; it must be a path below {directory}")
    return relative
