"""How a start comes into a run directory: what it goes on from, what it refuses, and from when on it owns it.

First it only reads, so a start by mistake changes nothing; then it takes the checkpoints over from older attempts, and
looks again whether one of them has published meanwhile.
"""

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import Claim, claim, list_claims
from janus_mega.checkpoint.disk import DISK
from janus_mega.checkpoint.finding import (
    Seekers,
    find_newest,
    note_published,
    read_patiently,
    why_not_from_scratch,
)
from janus_mega.checkpoint.format import write_bytes
from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.checkpoint.tensor_file import Unreadable
from janus_mega.observe.attempts import ATTEMPTS_DIR
from janus_mega.observe.sinks import METRICS_FILE
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.exits import RunEnded
from janus_mega.train.restoring import check_resume
from janus_mega.train.saving import CHECKPOINTS_DIR
from janus_mega.train.starting import FRESH_FILE, Start, job_name
from janus_mega.train.together import on_rank_0, seekers_of
from janus_mega.train.workload import Recipe, Workload

_log = logging.getLogger(__name__)
_ANEW = "anew"


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

    Whatever is wrong with it counts only while the folder stands still: an older attempt may publish and prune
    meanwhile, and what one rank was about to read is then gone.

    Raises:
        UserError: the directory was used and holds no good checkpoint, or one of another plan.
        RunEnded: a rank cannot read what it found, for no fault of the user's.
        Superseded: a newer attempt has it. Collective over: world.
    """
    root, seekers = recipe.run_dir / CHECKPOINTS_DIR, seekers_of(groups)
    is_fresh = start.fresh and on_rank_0(groups, lambda: _begin_anew(root, start.is_restart)) == _ANEW
    while True:
        seen = on_rank_0(groups, lambda: _names(root))
        damaged: set[str] = set()
        newest = find_newest(root, seekers, passed_over=damaged)
        reader, first_step, refusal = None, 0, None
        try:
            if newest is not None:
                reader, first_step = read_patiently(partial(_open, newest, workload, recipe))
            elif not is_fresh:
                on_rank_0(groups, lambda: _refuse_from_scratch(root, recipe.run_dir))
        except Exception as error:  # told after the agreement, or the other ranks would wait for ever
            refusal = error
        if not seekers.agree(refusal is None):
            if on_rank_0(groups, lambda: _names(root)) == seen:
                raise _agreed_refusal(refusal, newest, seekers)
            _log.warning("%s: checkpoints have come or gone meanwhile; looking again", recipe.name)
            continue
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


def _agreed_refusal(refusal: Exception | None, newest: Path | None, seekers: Seekers) -> Exception:
    """What a rank that could go on, or could not, ends with: all say alike whether the user has to mend something.

    A file that one host does not give is no bad input, and a job that is started again may well get it.
    """
    is_input = refusal is None or (isinstance(refusal, UserError) and not isinstance(refusal, Unreadable))
    told = refusal or UserError(f"{newest}: another rank cannot go on from it; see that rank's log")
    if seekers.agree(is_input):
        return told
    if refusal is not None:
        _log.error("%s: this rank cannot go on from it", newest, exc_info=refusal)
    return RunEnded(str(told))


def _open(newest: Path, workload: Workload, recipe: Recipe) -> tuple[CheckpointReader, int]:
    reader = open_checkpoint(newest)
    return reader, check_resume(reader, workload, recipe)


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


def _begin_anew(root: Path, is_restart: bool) -> str:
    """Carries --fresh out and keeps which job did; a launcher that starts a job again says --fresh again too.

    Returns:
        `_ANEW`, or nothing where this very job has done so already: it goes on from what it has saved since.
    """
    mark, job = root.parent / FRESH_FILE, job_name()
    if is_restart and mark.exists() and mark.read_text(encoding="utf-8") == job:
        _log.warning("--fresh counts for the first start of a job; this restart goes on from what that has saved")
        return ""
    _set_aside(root)
    DISK.make_directories(root.parent)
    aside = mark.with_name(f"{FRESH_FILE}.tmp")
    aside.unlink(missing_ok=True)
    write_bytes(aside, job.encode())
    DISK.rename(aside, mark)
    DISK.sync_directory(root.parent)
    return _ANEW


def _set_aside(root: Path) -> None:
    """Keeps the checkpoints of before under another name; older attempts lose them by that too."""
    if root.exists():
        aside = root.with_name(f"{root.name}.replaced-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        DISK.rename(root, aside)
        DISK.sync_directory(root.parent)
        _log.warning("--fresh: what was in %s is in %s now; the run begins at step 0", root, aside)
