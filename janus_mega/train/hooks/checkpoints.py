"""Saves every few steps and at the end."""

import time
from collections.abc import Callable

from janus_mega.train.loop import StepEvent


class CheckpointHook:
    """Saves every few steps and at the end; never twice at the same step."""

    def __init__(
        self,
        save: Callable[[int], object],
        save_every: int,
        saved_step: int = -1,
        hook_seconds: dict[str, float] | None = None,
    ) -> None:
        """`saved_step` is the step of the checkpoint that the run continues from, -1 if from none; seconds spent are
        added to `hook_seconds`."""
        self._hook_seconds = {} if hook_seconds is None else hook_seconds
        self._save = save
        self._save_every = save_every
        self._saved_step = saved_step

    def after_step(self, event: StepEvent) -> None:
        """Saves when due. Collective over: world (when due)."""
        if self._save_every and event.step % self._save_every == 0:
            start = time.perf_counter()
            self._save(event.step)
            self._saved_step = event.step
            self._hook_seconds["save"] = self._hook_seconds.get("save", 0.0) + time.perf_counter() - start

    def at_end(self, step: int) -> None:
        """Saves the final state. Collective over: world."""
        if self._saved_step != step:
            self._save(step)
