"""A disk without room, made of what Linux has: a file that takes no byte, and a limit that cuts writes off."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fill(path: Path) -> None:
    """Lets every write to a file that is not there yet fail with ENOSPC; it must not be read, it has no end."""
    path.symlink_to("/dev/full")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """What a file would hold beyond is cut off, in this process: a write fails once it has written a part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
