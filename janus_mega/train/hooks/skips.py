"""Records the steps whose update was left out, and goes back when they are too many in a row."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.config.schema import HealthConfig
from janus_mega.engine.interface import StepResult
from janus_mega.observe.lenient import LenientLines
from janus_mega.train.health import Health
from janus_mega.train.loop import StepEvent
from janus_mega.train.order import DataOrder

_log = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
"""In the run directory: {"step", "why", "loss", "grad_norm", "samples": [{"source", "uid", "row"}]} for a batch left
out, and {"first_step", "last_step", "why"} for those whose updates were undone by going back."""

GoBack = Callable[[Callable[[int], bool], int], int | None]
"""(which steps' checkpoints will do, present step) -> the step whose weights are in place now, or None."""


class SkipHook:
    """Keeps the record of `Health`; stops the run where going back does not help."""

    def __init__(
        self, health: Health, config: HealthConfig, order: DataOrder, run_dir: Path | None, go_back: GoBack
    ) -> None:
        """`run_dir` is None on ranks that write nothing; `order` tells what was in a batch."""
        self._health = health
        self._config = config
        self._order = order
        self._lines = None if run_dir is None else LenientLines(run_dir / SKIPPED_FILE)
        self._go_back = go_back

    def after_step(self, event: StepEvent) -> None:
        """Notes the step. Collective over: world (when going back).

        Raises:
            UserError: too many skips in a row, and the run may or can not go back.
        """
        result = event.result
        self._health.note(event.step, result.skipped)
        if not result.skipped:
            return
        self._record_batch(event.step, result)
        _log.warning("step %d: update left out on all ranks: %s", event.step, result.skipped)
        if self._health.skips_in_a_row >= self._config.max_skips_in_a_row:
            self._leave_spike(event)

    def _leave_spike(self, event: StepEvent) -> None:
        skips, last_update = self._health.skips_in_a_row, self._health.last_update
        what = f"step {event.step}: the updates of {skips} steps in a row were left out, the last because of "
        what += event.result.skipped
        if len(self._health.rewinds) >= self._config.max_rewinds:
            raise UserError(
                f"{what}; health.max_rewinds {self._config.max_rewinds} allows no further going back: lower the "
                f"learning rate, look at {SKIPPED_FILE} with janus-mega data blame, or raise it"
            )
        found = self._go_back(self._health.is_before_spike, event.step)
        if found is None:
            raise UserError(
                f"{what}; there is no checkpoint before step {last_update} to go back to: lower checkpoint.save_every "
                "or raise checkpoint.keep_last, or lower the learning rate"
            )
        undone = f"undone: at step {event.step} the run went back to the weights of step {found}"
        self._record({"first_step": found + 1, "last_step": last_update, "why": undone})
        _log.warning("%s; going on with the weights of step %d and the data after step %d", what, found, event.step)

    def _record_batch(self, step: int, result: StepResult) -> None:
        if self._lines is None:
            return
        values = {"loss": result.loss, "grad_norm": result.grad_norm}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._record({"step": step, "why": result.skipped, **finite, "samples": self._order.samples(step)})

    def _record(self, entry: dict[str, object]) -> None:
        if self._lines is not None:
            self._lines.append([entry])

    def at_end(self, step: int) -> None:
        """Nothing is left to do."""
