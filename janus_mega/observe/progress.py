"""Progress of anything that takes longer than a second: a bar with time left on a terminal, plain lines in a log.

    with Progress("image tokenizer", total=500) as progress:
        for step in range(500):
            ...
            progress.advance(note=f"loss {loss:.3f}")

A log gets a line every few seconds and one at the end, never control characters.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")

QUIET_S = 1.0
"""Work that ends sooner leaves no lines in a log."""


class Progress:
    """Counts `total` units of work and shows how far it is; a context manager."""

    def __init__(
        self,
        description: str,
        total: int,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        """`enabled` is False on every rank but one; `stream` defaults to stderr."""
        self._description = description
        self._total = total
        self._enabled = enabled
        self._stream = stream or sys.stderr
        self._seconds_between_lines = seconds_between_lines
        self._done = self._done_before = 0
        self._done_on_line = -1
        self._note = ""
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: RichProgress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._start_s = self._last_line_s = time.monotonic()
        if self._enabled and self._stream.isatty():
            self._bar = _bar(Console(file=self._stream))
            self._task = self._bar.add_task(self._description, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and self._done != self._done_on_line and time.monotonic() - self._start_s > QUIET_S:
            self._write_line()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Reports `count` more units as done; `note` stands at the end of the line until another one replaces it."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._note)
        elif self._enabled and time.monotonic() - self._last_line_s >= self._seconds_between_lines:
            self._write_line()

    def reach(self, done: int, total: int, note: str = "") -> None:
        """Reports that `done` of `total` units are done: for work that learns its total as it goes."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self.advance(done - self._done, note)

    def resume(self, done: int, total: int) -> None:
        """Says that `done` units were done before this began, so that they do not count for the time left."""
        self._done = self._done_before = done
        self._total = total
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=done)

    def _write_line(self) -> None:
        now_s = time.monotonic()
        self._last_line_s, self._done_on_line = now_s, self._done
        elapsed_s = now_s - self._start_s
        parts = [f"{self._description}: {self._done}/{self._total}"]
        if self._total:
            parts[0] += f" ({100 * self._done // self._total} %)"
        if self._done >= self._total:
            parts.append(f"took {clock(elapsed_s)}")
        elif self._done > self._done_before:
            left_s = elapsed_s / (self._done - self._done_before) * (self._total - self._done)
            parts.append(f"{clock(left_s)} left")
        parts += [self._note] if self._note else []
        self._stream.write(", ".join(parts) + "\n")
        self._stream.flush()


def track(items: Iterable[T], description: str, total: int | None = None, *, enabled: bool = True) -> Iterator[T]:
    """Yields the items and shows how far their consumer is."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with Progress(description, total, enabled=enabled) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """Returns a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
