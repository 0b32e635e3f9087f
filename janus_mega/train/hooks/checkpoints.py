"""Begins a save every few steps, tells what became of it, and does not let a run end before the last one is there."""

import time
from pathlib import Path
from typing import Protocol

from janus_mega.observe.sinks import SinkGroup
from janus_mega.train.loop import StepEvent


class Saves(Protocol):
    """What the hook asks of `saving.Saver`."""

    def save(self, step: int) -> None:
        """Begins to save. Collective over: world."""

    def finish(self, step: int) -> Path:
        """Saves what is not saved and waits. Collective over: world."""

    def look(self) -> None:
        """Hears of saves that have ended."""

    def news(self) -> dict[str, float]:
        """Metrics of those."""


class CheckpointHook:
    """Saves every few steps and at the end; never twice at the same step.

    Metrics of a save that ended (checkpoint/last_saved_step, /write_seconds, /failed) are written at the next border,
    in a line of their own; the one save of a run that saves at its end only is worth a line if it failed. The seconds
    that saves held training are added to `hook_seconds`.
    """

    def __init__(
        self, saver: Saves, save_every: int, resumed_step: int, sinks: SinkGroup, hook_seconds: dict[str, float]
    ) -> None:
        """`resumed_step` is the step of the checkpoint that the run continues from, -1 if from none."""
        self._saver = saver
        self._save_every = save_every
        self._resumed_step = resumed_step
        self._sinks = sinks
        self._hook_seconds = hook_seconds

    def after_step(self, event: StepEvent) -> None:
        """Saves when due. Collective over: world (when due).

        Raises:
            Superseded: a newer attempt has taken the checkpoints over.
        """
        self._saver.look()
        if self._save_every and event.step % self._save_every == 0:
            start = time.perf_counter()
            self._saver.save(event.step)
            self._hook_seconds["save"] = self._hook_seconds.get("save", 0.0) + time.perf_counter() - start
        self._tell(event.step)

    def at_end(self, step: int) -> None:
        """Sees to it that the final state is saved. Collective over: world.

        Raises:
            SaveFailed: it was not; what was saved before stands.
        """
        if self._resumed_step != step:
            try:
                self._saver.finish(step)
            finally:
                self._tell(step)

    def _tell(self, step: int) -> None:
        news = self._saver.news()
        if news.get("checkpoint/failed") or (news and self._save_every):
            self._sinks.scalars(step, news)
