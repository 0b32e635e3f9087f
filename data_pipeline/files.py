"""Files that are whole or absent: written beside their place, synced, then renamed."""

import hashlib
import os
from pathlib import Path


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees all of it or the state before."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
