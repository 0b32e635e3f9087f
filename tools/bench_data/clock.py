"""Time of this process and its children, and what is said of several such times."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds between two moments."""

    cpu_s: float
    """Processor seconds, user and system, of all threads and of children that have ended."""
    wall_s: float


class Stopwatch:
    """Starts when made."""

    def __init__(self) -> None:
        self._cpu = _cpu_seconds()
        self._wall = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds since the start as a dict of `Times`."""
        wall = time.perf_counter() - self._wall
        return asdict(Times(_cpu_seconds() - self._cpu, wall))


def _cpu_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over repeats."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; one value is all three."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)
