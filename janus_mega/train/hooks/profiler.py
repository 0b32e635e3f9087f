"""A window of steps under torch.profiler, as a trace that chrome://tracing and Perfetto open.

Every rank writes its own file: what one of them waits for shows in another's. The window begins when the step before it
ends, so it holds loading too.
"""

from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from janus_mega.observe.lenient import Lenient
from janus_mega.train.loop import StepEvent

PROFILE_DIR = "profile"
"""Folder of a run directory that receives traces."""


class ProfilerHook:
    """Records steps `first` to `last`, counted from 1, and writes `profile/steps-<first>-<last>-rank-<rank>.json`."""

    def __init__(self, run_dir: Path, rank: int, window: tuple[int, int], completed_steps: int) -> None:
        """`completed_steps` is where the run starts; a window that has begun by then is recorded from there on."""
        self._first, self._last = window
        self._path = run_dir / PROFILE_DIR / f"steps-{self._first}-{self._last}-rank-{rank}.json"
        self._profile: profile | None = None
        self._follow(completed_steps)

    def after_step(self, event: StepEvent) -> None:
        """Starts before the first step of the window and writes after its last."""
        self._follow(event.step)

    def at_end(self, step: int) -> None:
        """Writes a window that the end of the run has cut."""
        self._stop()

    def _follow(self, completed_steps: int) -> None:
        if completed_steps >= self._last:
            self._stop()
        elif completed_steps >= self._first - 1 and self._profile is None:
            has_cuda = torch.cuda.is_available()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_cuda else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            Lenient(str(self._path)).attempt(partial(self._write, self._profile))
            self._profile = None

    def _write(self, recorded: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._path))
