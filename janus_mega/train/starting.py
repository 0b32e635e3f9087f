"""What belongs to one start of a run and not to the run: its record, its signals, its faults, where it is.

Entered before a rank joins the others, so that a signal finds somebody who takes it during the whole time.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from janus_mega.observe.attempts import Attempt, recorded_attempt
from janus_mega.observe.pulse import Pulse
from janus_mega.observe.stopping import StopFlag
from janus_mega.train.exits import NotSaved, exit_code_of
from janus_mega.train.faults import Faults, read_faults
from janus_mega.train.stop import StopSignals

_log = logging.getLogger(__name__)

_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""Variables that count how often a launcher has started the same command again by itself."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start on this rank."""

    attempt: Attempt = field(default_factory=lambda: Attempt(None))
    """Its record."""
    stop: StopFlag = field(default_factory=StopFlag)
    """Whether to end early."""
    pulse: Pulse = field(default_factory=Pulse)
    """Where the rank is."""
    fresh: bool = False
    """Whether to begin anew in a run directory that was used before."""
    faults: Faults | None = None
    """What is to go wrong on purpose; None where nothing is."""

    def strike(self, phase: str, step: int = 0) -> None:
        """Lets the faults happen that are planned for this place; see `faults`."""
        if self.faults is not None:
            self.faults.strike(phase, step)


@contextmanager
def started(run_dir: Path, stop_grace_s: float, *, fresh: bool = False) -> Iterator[Start]:
    """Records a start (rank 0) and takes stop signals.

    Raises:
        UserError: the faults asked for are none.
        NotSaved: an error after a stop signal, so most likely for it: peers that are gone, readers that were ended.
    """
    rank = int(os.environ.get("RANK", "0"))
    if fresh and any(int(os.environ.get(name) or 0) for name in _RESTARTS):
        _log.warning("--fresh counts for the first start of a job; this restart goes on from what that has saved")
        fresh = False
    faults = read_faults(run_dir, rank, int(os.environ.get("WORLD_SIZE", "1")))
    stop, pulse = StopFlag(), Pulse()
    with (
        StopSignals(stop, pulse, rank, stop_grace_s) as signals,
        recorded_attempt(run_dir, enabled=rank == 0) as attempt,
    ):
        signals.note_end = attempt.finish
        try:
            yield Start(attempt, stop, pulse, fresh, faults)
        except Exception as error:
            if not stop.asked or exit_code_of(error) is not None:
                raise
            _log.exception("rank %d, asked to stop, met an error", rank)
            by = f"stopped by {signal.Signals(stop.signal).name}" if stop.signal else "stopped by another rank's signal"
            raise NotSaved(
                f"{by} in step {pulse.step + 1} without having saved: {type(error).__name__}: {error}"
            ) from error
