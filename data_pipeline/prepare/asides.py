"""Names of files that are still being written, so that processes at the same file never meet, and their removal.

`000012.tar` is written as `000012.tar.<host>-<pid>.tmp` and renamed. Two processes that do the same task write two such
files of equal content; whoever renames last replaces equal bytes by equal bytes. What a killed process leaves is
removed by the next one on its machine, or when the directory is finished.
"""

import os
import re
import socket
from pathlib import Path

_MARKED = re.compile(r"\.[^/]+-\d+\.tmp$")


def aside_of(path: Path) -> Path:
    """Where this process writes a file before it is renamed to `path`."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def is_aside(name: str) -> bool:
    """Whether a file's name is that of something half-written."""
    return _MARKED.search(name) is not None


def remove_dead_asides(directory: Path) -> None:
    """Removes what processes of this machine that are no more have left half-written."""
    host = socket.gethostname()
    for name in _names(directory):
        match = re.search(rf"\.{re.escape(host)}-(\d+)\.tmp$", name)
        if match is not None and not _is_alive(int(match[1])):
            (directory / name).unlink(missing_ok=True)


def remove_asides(directory: Path) -> None:
    """Removes everything half-written; for directories in which nothing is left to be written."""
    for name in _names(directory):
        if is_aside(name):
            (directory / name).unlink(missing_ok=True)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
