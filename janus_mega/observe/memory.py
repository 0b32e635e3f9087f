"""Peak memory of a process tree, and torch's peak on a CUDA device.

The tree is measured as PSS (proportional set size): a page shared by k processes counts 1/k in each, so the sum over
forked ranks is what the machine really holds. Linux offers it per process in smaps_rollup; a thread samples it, which
misses peaks shorter than the interval. Elsewhere the answer is 0 and callers say "not measured".
"""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")


class PeakMemory:
    """Samples the PSS of this process and all its descendants until it is stopped; a context manager."""

    def __init__(self, interval_s: float = 0.5) -> None:
        self._interval_s = interval_s
        self._root_pid = os.getpid()
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    @property
    def peak_bytes(self) -> int:
        """Largest sum seen so far, in bytes."""
        return self._peak_bytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._measure()

    def _sample(self) -> None:
        self._measure()
        while not self._stop.wait(self._interval_s):
            self._measure()

    def _measure(self) -> None:
        self._peak_bytes = max(self._peak_bytes, tree_pss_bytes(self._root_pid))


def tree_pss_bytes(root_pid: int) -> int:
    """Returns the PSS of a process and its descendants in bytes, 0 where the system does not tell."""
    return sum(pss_bytes(pid) for pid in process_tree(root_pid))


def process_tree(root_pid: int) -> list[int]:
    """Returns a process and all its descendants, by the parents that /proc names."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything; the parent is the second word behind it.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # the process ended while we looked
        children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [root_pid]
    for pid in tree:  # grows while it is walked
        tree += children.get(pid, [])
    return tree


def pss_bytes(pid: int) -> int:
    """Returns the PSS of one process in bytes, 0 where it has ended or cannot be read."""
    try:
        with (PROC / str(pid) / "smaps_rollup").open(encoding="ascii") as lines:
            kib = next((line.split()[1] for line in lines if line.startswith("Pss:")), "0")
    except OSError:
        return 0
    return int(kib) * 1024


def cuda_peak_bytes() -> int:
    """Returns the most memory torch ever held on this rank's CUDA device in bytes, 0 without one."""
    import torch  # sampling a process tree needs no torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def host_peak_bytes() -> int:
    """Returns the most memory this process ever had resident in bytes, libraries and shared pages included."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
