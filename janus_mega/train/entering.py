"""How a start comes into a run directory: what it goes on from, what it refuses, and from when on it owns it.

First it only reads, so a start by mistake changes nothing; then it takes the checkpoints over from older attempts, and
looks again whether one of them has published meanwhile.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import Claim, claim, list_claims
from janus_mega.checkpoint.disk import DISK
from janus_mega.checkpoint.finding import find_newest, note_published, why_not_from_scratch
from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.observe.attempts import ATTEMPTS_DIR
from janus_mega.observe.sinks import METRICS_FILE
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.restoring import check_resume
from janus_mega.train.saving import CHECKPOINTS_DIR
from janus_mega.train.starting import Start
from janus_mega.train.together import on_rank_0, seekers_of
from janus_mega.train.workload import Recipe, Workload

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """What a start found."""

    reader: CheckpointReader | None
    """The checkpoint it goes on from; None where it begins, or once that is put in place."""
    is_resumed: bool
    """Whether there is one."""
    first_step: int
    """Steps that are done."""
    place: Claim | None
    """Its right to save; None where nothing is left to do."""
    damaged: frozenset[str] = frozenset()
    """Names of checkpoints that were passed over."""


def enter(workload: Workload, recipe: Recipe, groups: ProcessGroups, start: Start) -> Entry:
    """Finds what to go on from, and takes the run directory over.

    Raises:
        UserError: the directory was used and holds no good checkpoint, or one of another plan.
        Superseded: a newer attempt has it. Collective over: world.
    """
    root, seekers = recipe.run_dir / CHECKPOINTS_DIR, seekers_of(groups)
    if start.fresh:
        on_rank_0(groups, lambda: _set_aside(root))
    while True:
        seen = on_rank_0(groups, lambda: _names(root))
        damaged: set[str] = set()
        newest = find_newest(root, seekers, passed_over=damaged)
        if newest is None and not start.fresh:
            on_rank_0(groups, lambda: _refuse_from_scratch(root, recipe.run_dir))
        reader = open_checkpoint(newest) if newest else None
        first_step = check_resume(reader, workload, recipe) if reader else 0
        if reader and first_step >= recipe.last_step:
            return Entry(reader, True, first_step, None)
        key = on_rank_0(groups, lambda: str(claim(root, _number(root, recipe.run_dir, start)).key))
        if on_rank_0(groups, lambda: _names(root)) == seen:
            if reader:
                on_rank_0(groups, lambda: note_published(root))
                _log.info("%s: goes on from %s", recipe.name, newest)
            place = Claim.from_key(root, int(key))
            return Entry(reader, reader is not None, first_step, place, frozenset(damaged))
        _log.warning("%s: an older attempt has published meanwhile; looking again", recipe.name)


def _names(root: Path) -> str:
    return " ".join(entry.path.name for entry in list_checkpoints(root))


def _number(root: Path, run_dir: Path, start: Start) -> int | None:
    """The attempt's own number, unless its record begins anew beside older claims."""
    number = start.attempt.number
    highest = max((other.number for other in list_claims(root)), default=0)
    if number is None or number > highest:
        return number
    is_known = number < highest and (run_dir / ATTEMPTS_DIR / f"{highest:04d}").exists()
    return number if is_known else None


def _refuse_from_scratch(root: Path, run_dir: Path) -> None:
    why = why_not_from_scratch(root, run_dir / METRICS_FILE)
    if why is not None:
        raise UserError(
            f"{run_dir}: {why}; a run that was used does not begin at step 0 by itself: bring a checkpoint back to "
            f"{root}, choose another run_dir, or begin anew with --fresh"
        )


def _set_aside(root: Path) -> None:
    """Keeps the checkpoints of before under another name; older attempts lose them by that too."""
    if root.exists():
        aside = root.with_name(f"{root.name}.replaced-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        DISK.rename(root, aside)
        DISK.sync_directory(root.parent)
        _log.warning("--fresh: what was in %s is in %s now; the run begins at step 0", root, aside)
