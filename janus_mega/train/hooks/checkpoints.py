"""Saves every few steps and at the end."""

from collections.abc import Callable

from janus_mega.train.loop import StepEvent


class CheckpointHook:
    """Saves every few steps and at the end; never twice at the same step."""

    def __init__(self, save: Callable[[int], object], save_every: int, saved_step: int = -1) -> None:
        """`saved_step` is the step of the checkpoint that the run continues from, -1 if from none."""
        self._save = save
        self._save_every = save_every
        self._saved_step = saved_step

    def after_step(self, event: StepEvent) -> None:
        """Saves when due. Collective over: world (when due)."""
        if self._save_every and event.step % self._save_every == 0:
            self._save(event.step)
            self._saved_step = event.step

    def at_end(self, step: int) -> None:
        """Saves the final state. Collective over: world."""
        if self._saved_step != step:
            self._save(step)
