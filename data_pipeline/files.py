"""Files that are whole or absent: written beside their place, synced, then renamed."""

import hashlib
import os
from pathlib import Path
from typing import IO


def write_aside(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Writes a file so that a reader sees all of it or the state before; `aside` is where it is written first."""
    aside = aside or path.with_name(path.name + ".tmp")
    with aside.open("wb") as stream:
        stream.write(content)
        sync_and_replace(stream, aside, path)


def sync_and_replace(stream: IO[bytes], aside: Path, path: Path) -> None:
    """Ends the writing of `aside`: on the disk, closed, then renamed to `path`."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    aside.replace(path)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
