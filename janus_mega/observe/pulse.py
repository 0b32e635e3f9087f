"""Where this rank is in its work: written by the main thread in passing, read by the thread that watches it.

Plain attribute writes, no lock: a reader may see a phase with the time of the one before, which costs a watcher nothing
but a heartbeat's worth of accuracy.
"""

import statistics
import time
from collections import deque

_REMEMBERED_STEPS = 64


class Pulse:
    """Step, phase and micro-batch of a rank, and when it last made visible progress."""

    __slots__ = ("_began", "_durations", "is_long_phase", "micro_batch", "phase", "progress_at", "step")

    def __init__(self) -> None:
        self.step = 0
        """Completed steps of this run, as its log counts them."""
        self.phase = "start"
        self.micro_batch = 0
        """Forward passes begun in this step, over all chunks of the rank."""
        self.is_long_phase = True
        """Whether the phase may take much longer than a step: before the first one, and in hooks."""
        self.progress_at = self._began = time.monotonic()
        self._durations: deque[float] = deque(maxlen=_REMEMBERED_STEPS)

    def begin_step(self) -> None:
        """The loop asks for the next batch."""
        self.micro_batch = 0
        self.phase = "data"
        self.is_long_phase = not self._durations
        self.progress_at = self._began = time.monotonic()

    def enter(self, phase: str) -> None:
        """The next part of a step; no progress by itself."""
        self.phase = phase

    def end_step(self, step: int) -> None:
        """A step is complete."""
        self.step = step
        self.progress_at = time.monotonic()
        self._durations.append(self.progress_at - self._began)

    def begin_hook(self, name: str) -> None:
        """Something beside training starts: saving, validation, ..."""
        self.phase = name
        self.is_long_phase = True
        self.progress_at = time.monotonic()

    def tick(self) -> None:
        """Whatever is waited for has moved on."""
        self.progress_at = time.monotonic()

    def median_step_s(self) -> float:
        """Median of the last steps' durations, seconds; 0 before the first."""
        return statistics.median(list(self._durations)) if self._durations else 0.0
