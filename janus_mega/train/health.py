"""Which updates stand: a judge over reduced values, and the record of what was left out.

The step number is the position in the data and nothing else: a step whose update is left out counts, its batch is
passed, the learning rate goes on. What then differs from the step number is the number of updates that AdamW has made,
so it is kept here and saved with every checkpoint. Going back restores weights, moments and count of an earlier
checkpoint but neither step nor position: the batches in between are thereby left out.

Values that are no numbers, and spikes, never enter the window: one of them would make every later step look small or
unusual. All ranks hold the same record, since all judge the same reduced values.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from janus_mega.config.schema import HealthConfig
from janus_mega.parallel.groups import ProcessGroups

MIN_RELATIVE_DEVIATION = 1e-3
"""Smallest standard deviation over mean that a window is taken to have; on a plateau 0.1 % are no spike."""


class Health:
    """Judges steps and remembers; see `interface.JudgeStep`."""

    def __init__(self, config: HealthConfig, agree: Callable[[bool], bool] = bool) -> None:
        """`agree` tells whether any rank says yes; asked in every step when spikes are looked for."""
        self._config = config
        self._agree = agree
        self._windows: dict[str, deque[float]] = {}
        self.updates = 0
        """Updates that the optimizer has made."""
        self.skips_in_a_row = 0
        self.last_update = 0
        """Step whose end the weights are from."""
        self.rewinds: list[tuple[int, int]] = []
        """(step gone back to, step it happened at); what was trained in between is abandoned."""

    def judge(self, values: Mapping[str, float]) -> str:
        """Why the update is not to be made, or empty. Collective over: world (when spikes are looked for)."""
        reason = _not_finite(values)
        if self._config.spike_sigmas > 0:
            reason = reason or self._find_spike(values)
            # Sums over groups may differ in their last bit between ranks; a threshold must not tell them apart.
            if self._agree(bool(reason)) and not reason:
                reason = "a spike on another rank"
            if not reason:
                for name, value in values.items():
                    self._windows.setdefault(name, deque(maxlen=self._config.spike_window)).append(value)
        return reason

    def _find_spike(self, values: Mapping[str, float]) -> str:
        for name, value in values.items():
            window = self._windows.get(name, ())
            if 2 * len(window) < self._config.spike_window:
                continue
            mean = math.fsum(window) / len(window)
            deviation = math.sqrt(math.fsum((seen - mean) ** 2 for seen in window) / (len(window) - 1))
            sigmas = (value - mean) / max(deviation, MIN_RELATIVE_DEVIATION * abs(mean), 1e-12)
            if sigmas > self._config.spike_sigmas:
                return (
                    f"{name} {value:.4g} is {sigmas:.1f} deviations above {mean:.4g}, its mean of {len(window)} steps"
                )
        return ""

    def note(self, step: int, skipped: str) -> None:
        """Enters a finished step."""
        if skipped:
            self.skips_in_a_row += 1
        else:
            self.skips_in_a_row = 0
            self.updates += 1
            self.last_update = step

    def is_before_spike(self, step: int) -> bool:
        """Whether a checkpoint of a step is of this run's line and older than its weights."""
        return step < self.last_update and not any(start < step < end for start, end in self.rewinds)

    def go_back(self, saved: Mapping[str, Any], found_step: int, step: int) -> None:
        """Takes on the record of an earlier checkpoint, at a step.

        Args:
            saved: what `state` gave for that checkpoint.
            found_step: the step of the checkpoint.
            step: the present one.
        """
        rewinds = [*self.rewinds, (found_step, step)]
        self.restore(saved, found_step)
        self.rewinds = rewinds
        self.skips_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "updates": self.updates,
            "last_update": self.last_update,
            "skips_in_a_row": self.skips_in_a_row,
            "rewinds": [list(pair) for pair in self.rewinds],
            "windows": {name: list(window) for name, window in self._windows.items()},
        }

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Goes on from a checkpoint; one that holds no record (empty) had every update made."""
        self.updates = saved.get("updates", step)
        self.last_update = saved.get("last_update", step)
        self.skips_in_a_row = saved.get("skips_in_a_row", 0)
        self.rewinds = [(start, end) for start, end in saved.get("rewinds", [])]
        windows = saved.get("windows", {})
        self._windows = {name: deque(seen, maxlen=self._config.spike_window) for name, seen in windows.items()}


def _not_finite(values: Mapping[str, float]) -> str:
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    return f"{', '.join(bad)}: no finite number" if bad else ""


def any_rank(groups: ProcessGroups) -> Callable[[bool], bool]:
    """A function that tells every rank whether any says yes. What it returns is collective over: world."""

    def agree(says_yes: bool) -> bool:
        flag = torch.tensor(int(says_yes), device=groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    return agree
