"""What a run saves, and how: its whole state under `checkpoints/`, or the weights alone for somebody who looks at them.

A save begins with a snapshot at a step border and is written by a thread beside training (`writer`); at most one is
under way, so the next waits for it, and so does everybody who reads checkpoints. A save that fails is told and counted,
and training goes on: the newest checkpoint before it stands. The last save of a run is another matter, its failure ends
the run. Saves that are waited for anyway are written from the live tensors, without a copy.

Also the way back to an earlier state while the run goes on.
"""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from janus_mega.checkpoint.claim import Claim, Superseded
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.finding import find_newest, note_published
from janus_mega.checkpoint.manager import Ranks, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.checkpoint.staging import GIB, Snapshot, Staging, failed, live
from janus_mega.checkpoint.state import TrainState
from janus_mega.train.exits import DEFECT, RunEnded
from janus_mega.train.restoring import LiveState
from janus_mega.train.starting import Start
from janus_mega.train.together import seekers_of
from janus_mega.train.workload import Recipe, Workload
from janus_mega.train.writer import Outcome, TellingDisk, Verdict, Writer

_log = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"
"""Folder of a run directory that holds its checkpoints."""
LONG_WAIT_S = 1.0
"""Seconds that training may wait for a save in silence."""
LAST_WAIT_S = 60.0
"""How long a process that ends by an error lets its writer go on."""


class SaveFailed(RunEnded):
    """A checkpoint that the run cannot do without was not saved."""

    exit_code = DEFECT


class Saver:
    """Writes checkpoints of one engine; a context manager around training."""

    def __init__(
        self, workload: Workload, recipe: Recipe, live_state: LiveState, place: Claim | Path, start: Start | None = None
    ) -> None:
        """`place` is where the run's checkpoints go; `start` is told that somebody waits and does not hang, and that
        the run was taken over."""
        start, groups = start or Start(), live_state.engine.groups
        self._workload = workload
        self._recipe = recipe
        self._live = live_state
        self._place = place
        self.disk: Disk = DISK
        """What is written through."""
        self.damaged: set[str] = set()
        """Names of checkpoints that were passed over; retention does not count them."""
        self._stop = start.stop
        self._commit = start.attempt.commit
        self._writer = Writer(groups.saving, start.pulse.tick)
        self._staging = Staging(int(recipe.checkpoint.staging_gib * GIB))
        self._is_prepared = not (recipe.checkpoint.asynchronous and recipe.checkpoint.save_every)
        self._ranks = Ranks(groups.layout.rank, groups.layout.world_size, self._writer.agree)
        self._last: Outcome | None = None
        self._num_failed = 0
        self._news: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is under way is not lost by an error here: the writers of all ranks that live go on for a while."""
        if not self._writer.let_go(LAST_WAIT_S):
            _log.error("a checkpoint was still being written when the run ended; it has no name and counts for nothing")

    def save(self, step: int) -> None:
        """Begins to save all that a resume needs; returns when training may go on. Old checkpoints go afterwards.

        A step that is saved already (the run went back there just now) is not saved again.

        Raises:
            Superseded: a newer attempt has taken the checkpoints over. Collective over: world.
        """
        start = time.perf_counter()
        self.settle()
        waited_s = time.perf_counter() - start
        if waited_s > LONG_WAIT_S:
            _log.warning("step %d: training waited %.1f s for the save before this one; a larger checkpoint.save_every "
                         "or a faster disk would not hold it", step, waited_s)  # fmt: skip
        if self._is_saved(step):
            return
        snapshot = self._snapshot(step) if self._recipe.checkpoint.asynchronous else live(self._live.slices())
        self._begin(self._place, snapshot, self._live.at(step))
        self._writer.wait_until(snapshot.free.wait)
        if not self._recipe.checkpoint.asynchronous:
            self.settle()

    def _snapshot(self, step: int) -> Snapshot:
        """A copy, or the live tensors where there is no memory for one."""
        try:
            try:
                return self._staging.snapshot(self._live.slices())
            except MemoryError as error:
                _log.warning("step %d: no memory to copy what is saved (%s): training waits until it is written; a "
                             "smaller checkpoint.staging_gib would copy a part", step, error)  # fmt: skip
            return live(self._live.slices())
        except Exception as error:  # of this rank alone; all must hear of it
            return failed(error)

    def _is_saved(self, step: int) -> bool:
        return self._last is not None and self._last.step == step and self._last.path is not None

    def finish(self, step: int) -> Path:
        """The checkpoint of a step, saved by now if it was not; nothing is under way any more.

        Raises:
            SaveFailed: it was not saved; what was saved before stands.
            Superseded: a newer attempt has taken the checkpoints over. Collective over: world.
        """
        self.settle()
        if not self._is_saved(step):
            self._begin(self._place, live(self._live.slices()), self._live.at(step))
            self.settle()
        assert self._last is not None
        if self._last.path is None:
            raise SaveFailed(f"step {step}: the last checkpoint was not saved: {_in_words(self._last.error)}")
        return self._last.path

    def settle(self) -> None:
        """Waits for the save that is under way, if there is one.

        Raises:
            Superseded: a newer attempt has taken the checkpoints over. Collective over: saving.
        """
        self._hear(self._writer.take(wait=True))
        self._end_if_superseded()

    def look(self) -> None:
        """At a step border: hears of a save that has ended meanwhile, and makes room for the first copy.

        Ranks hear of an end at different borders, so that one was superseded, or that the agreement on it was lost, is
        told with the losses of the next step, and all end at the border after it.

        Raises:
            Superseded: a newer attempt has taken the checkpoints over.
            SaveFailed: nothing can be saved any more.
        """
        self._hear(self._writer.take(wait=self._stop.taken_over))
        if self._stop.taken_over:
            self._end_if_superseded()
            raise Superseded("another rank has found that a newer attempt has taken over")
        if self._stop.saves_lost:  # a save that is under way here waits for ranks that will not come
            why = self._last.error if self._last and self._last.verdict is Verdict.lost else None
            told = _in_words(why) if why else "see the logs of the others"
            raise SaveFailed(f"the ranks can no longer agree on saves ({told}); start again") from why
        if not self._is_prepared:
            self._is_prepared = True
            self._prepare()

    def _prepare(self) -> None:
        try:
            self._staging.prepare(self._live.outlines())
        except Exception as error:  # the first save makes it, if it can
            _log.warning("staging memory is not made ahead: %s", _in_words(error))

    def news(self) -> dict[str, float]:
        """Metrics of saves that have ended since this was asked last; empty if none has."""
        news, self._news = self._news, {}
        return news

    @property
    def own(self) -> str:
        """A word that belongs to this attempt alone, alike on all ranks, for names of what no two may share."""
        return f"{self._place.key:016x}" if isinstance(self._place, Claim) else "unclaimed"

    def save_weights(self, folder: Path, step: int) -> Path:
        """Saves the weights below a folder that is this attempt's own, enough to run the model, and waits for it.

        Raises:
            SaveFailed: they were not saved; on all ranks alike. Collective over: world.
        """
        self.settle()
        self._begin(folder, live(self._live.weights()), self._live.at(step))
        outcome = self._writer.take(wait=True)
        assert outcome is not None
        if outcome.path is None:
            raise SaveFailed(f"{folder}: {_in_words(outcome.error)}") from outcome.error
        return outcome.path

    def go_back(self, accept: Callable[[int], bool], step: int) -> int | None:
        """Puts weights, moments and health of the newest acceptable checkpoint in place, and saves that as `step`.

        Step and position in the data stay. The new checkpoint lets a run that is stopped now go on from here, not from
        a checkpoint that was given up.

        Returns:
            The step of the checkpoint, None if there is none. Collective over: world.

        Raises:
            SaveFailed: what the run went back to was not saved.
            Superseded: a newer attempt has taken the checkpoints over.
        """
        self.settle()
        root, seekers = self._recipe.run_dir / CHECKPOINTS_DIR, seekers_of(self._live.engine.groups)
        found = find_newest(root, seekers, accept, self.damaged)
        if found is None:
            return None
        reader = open_checkpoint(found)
        self._live.go_back(reader, step)
        self._last = None  # a checkpoint of this step, if there is one, is of what was given up
        self.finish(step)  # its first agreement comes before anything is pruned, so nobody still reads
        return reader.step

    def _begin(self, place: Claim | Path, snapshot: Snapshot, state: TrainState) -> None:
        state = copy.deepcopy(state)
        extra_files = self._workload.extra_files()
        disk = TellingDisk(self.disk, self._writer.note_progress)

        def job() -> Path:
            try:
                saved = save_checkpoint(
                    place,
                    snapshot,
                    state,
                    ranks=self._ranks,
                    extra_files=extra_files,
                    about=self._about(),
                    disk=disk,
                )
            finally:
                snapshot.free.set()
            if self._ranks.rank == 0 and place is self._place:
                self._clean_up(saved, disk)
            return saved

        self._writer.begin(state.step, job)

    def _clean_up(self, saved: Path, disk: Disk) -> None:
        checkpoint = self._recipe.checkpoint
        try:
            note_published(saved.parent, disk)
            keep = checkpoint.keep_last, checkpoint.keep_every
            apply_retention(self._place, *keep, written=saved, bad=self.damaged, disk=disk)
        except Superseded:
            raise
        except Exception as error:
            _log.warning("%s is saved, but what comes after a save was not done: %s", saved.name, _in_words(error))

    def _about(self) -> dict[str, Any]:
        layout, parallel = self._live.engine.groups.layout, self._recipe.parallel
        sizes = {name: size for name, size in asdict(layout).items() if name != "rank"}
        return {
            "layout": {
                **sizes,
                "dp_size": layout.dp_size,
                "virtual_pp_size": parallel.virtual_pp_size,
                "zero_stage": parallel.zero_stage,
                "backend": parallel.backend.value,
                "precision": parallel.precision.value,
            },
            "commit": self._commit,
        }

    def _hear(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        self._last = outcome
        self._stop.lost = self._stop.lost or outcome.verdict is Verdict.lost
        if outcome.verdict is Verdict.superseded:
            self._stop.superseded = True
        elif outcome.path is None:
            self._num_failed += 1
            _log.error("the checkpoint of step %d was not saved: %s; training goes on, the newest one before it stands",
                       outcome.step, _in_words(outcome.error), exc_info=_unexpected(outcome.error))  # fmt: skip
        else:
            self._news["checkpoint/last_saved_step"] = outcome.step
            self._news["checkpoint/write_seconds"] = outcome.seconds
            _log.info("saved %s in %.1f s", outcome.path, outcome.seconds)
        self._news["checkpoint/failed"] = self._num_failed
        _let_go(outcome.error)

    def _end_if_superseded(self) -> None:
        if self._last is not None and self._last.verdict is Verdict.superseded:
            raise Superseded(_in_words(self._last.error)) from self._last.error


def _in_words(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if error else "unknown"


def _let_go(error: BaseException | None) -> None:
    """Drops the frames of an error and of those behind it, which hold on to tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _unexpected(error: BaseException | None) -> BaseException | None:
    """Errors whose traceback helps: all but those of disks and peers."""
    return None if isinstance(error, OSError) else error
