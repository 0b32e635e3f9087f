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
_JOBS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
"""Variables that name what all starts of a command by a launcher have in common."""
FRESH_FILE = ".fresh"
"""In the run directory: the name of the job that was the last to carry --fresh out."""


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
    """Whether to begin anew in a run directory that was used before; a restart may have done so already."""
    is_restart: bool = False
    """Whether a launcher has started the same command again by itself."""
    faults: Faults | None = None
    """What is to go wrong on purpose; None where nothing is."""

    def strike(self, phase: str, step: int = 0) -> None:
        """Lets the faults happen that are planned for this place; see `faults`."""
        if self.faults is not None:
            self.faults.strike(phase, step)


def job_name() -> str:
    """What the launcher calls the job that this start belongs to; empty where nothing has launched it."""
    return next((name for variable in _JOBS if (name := os.environ.get(variable))), "")


def _forget_fresh(mark: Path) -> None:
    """A first start of this name: what an earlier job of the same name has carried out was not for this one."""
    if mark.exists() and mark.read_text(encoding="utf-8") == job_name():
        mark.unlink(missing_ok=True)


@contextmanager
def started(run_dir: Path, stop_grace_s: float, *, fresh: bool = False) -> Iterator[Start]:
    """Records a start (rank 0) and takes stop signals.

    Raises:
        UserError: the faults asked for are none.
        NotSaved: an error after a stop signal, so most likely for it: peers that are gone, readers that were ended.
    """
    rank = int(os.environ.get("RANK", "0"))
    is_restart = any(int(os.environ.get(name) or 0) for name in _RESTARTS)
    if fresh and not is_restart and rank == 0:  # not every launcher's names of jobs are unique
        _forget_fresh(run_dir / FRESH_FILE)
    faults = read_faults(run_dir, rank, int(os.environ.get("WORLD_SIZE", "1")))
    stop, pulse = StopFlag(), Pulse()
    with (
        StopSignals(stop, pulse, rank, stop_grace_s) as signals,
        recorded_attempt(run_dir, enabled=rank == 0) as attempt,
    ):
        signals.note_end = attempt.finish
        try:
            yield Start(attempt, stop, pulse, fresh, is_restart, faults)
        except Exception as error:
            if not stop.asked or exit_code_of(error) is not None:
                raise
            _log.exception("rank %d, asked to stop, met an error", rank)
            by = f"stopped by {signal.Signals(stop.signal).name}" if stop.signal else "stopped by another rank's signal"
            raise NotSaved(
                f"{by} in step {pulse.step + 1} without having saved: {type(error).__name__}: {error}"
            ) from error
