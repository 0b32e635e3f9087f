"""The thread beside every rank's training that notices when no step ends any more, and says which rank is why.

Every rank watches itself and reads the files of the others; there is no message between them, since what hangs may be
the network. A rank that waits for one that still has time, in a hook that is slow on that rank alone, has no hang to
report. The lowest rank that is alive writes one report with the stacks of all that live. A thread can do this while the
main thread sits in a collective, because gloo, NCCL and the CUDA runtime release the interpreter.
"""

import faulthandler
import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from janus_mega.config.schema import HangAction, HealthConfig
from janus_mega.observe.lenient import Lenient, write_whole
from janus_mega.observe.pulse import Pulse
from janus_mega.parallel.groups import COLLECTIVE_TIMEOUT_S, ProcessGroups
from janus_mega.train.culprits import Beats, Culprit, find_culprits
from janus_mega.train.heartbeat import Heartbeat

_log = logging.getLogger(__name__)

HANG_EXIT_CODE = 86
"""Of every rank that ends itself because the job hung."""
STEP_FACTOR = 20
"""Median steps that a step may take where that is longer than the timeout."""
LONG_PHASE_FACTOR = 10
"""Times the timeout that hooks may take, and whatever comes before the end of the first step."""
MAX_INTERVAL_S = 1.0
_REPORTS = "hang-*.json"
_BEATS_PER_TIMEOUT = 10
_LIVE_S = 2.0
"""Seconds (and at least two beats and a half) within which a rank that lives beats, on an overloaded machine too."""


def collective_timeout_s(config: HealthConfig) -> float:
    """How long collectives may take: longer than a watchdog waits at most, which names the rank that is the cause."""
    return max(COLLECTIVE_TIMEOUT_S, 1.1 * LONG_PHASE_FACTOR * config.hang_timeout_s)


class Watch:
    """Beats, notices, reports; a context manager around training."""

    def __init__(self, pulse: Pulse, config: HealthConfig, run_dir: Path, groups: ProcessGroups | None) -> None:
        """Does nothing if the timeout is 0. To be made in the thread that trains; `groups` is None while ranks join."""
        self._pulse = pulse
        self._config = config
        self._run_dir = run_dir
        self._heartbeat = Heartbeat(run_dir, pulse, groups, threading.get_ident())
        self._interval_s = min(MAX_INTERVAL_S, config.hang_timeout_s / _BEATS_PER_TIMEOUT)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janus-mega-watch", daemon=True)
        self._live_s = max(_LIVE_S, 2.5 * self._interval_s)
        self._reported = 0.0
        self._seen: dict[int, tuple[int, float]] = {}
        """Rank -> its last beat and when that was first read, while a limit is near."""
        self._beats = Lenient(str(self._heartbeat.folder), catches_up=True)
        self._files = Lenient("what is known of a hang")

    def __enter__(self) -> "Watch":
        if self._config.hang_timeout_s > 0:
            self._heartbeat.folder.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._beat()
                now = time.monotonic()
                if self._is_stalled(now) and not self._somebody_has_time(now):
                    self._investigate()
            except OSError as error:  # a folder that is gone must not end training
                _log.warning("heartbeats cannot be read by rank %d: %s", self._heartbeat.rank, error)

    def _beat(self) -> bool:
        return self._beats.attempt(lambda: self._heartbeat.beat(self.limit_s()))

    def limit_s(self) -> float:
        """Seconds without progress that are accepted in the present phase."""
        limit = max(self._config.hang_timeout_s, STEP_FACTOR * self._pulse.median_step_s())
        return limit * LONG_PHASE_FACTOR if self._pulse.is_long_phase else limit

    def _is_stalled(self, now: float) -> bool:
        """Whether time is up; keeps which ranks have beaten, as of `now`, before all files are read.

        Reading those of thousands of ranks may take longer than a rank that lives is given to beat again.
        """
        last = self._pulse.progress_at
        left_s = self.limit_s() - (now - last)
        if left_s > self._live_s + self._interval_s:
            self._seen.clear()
        elif last != self._reported:
            for rank, told in self._heartbeat.read_all().items():
                if self._seen.get(rank, (-1, 0.0))[0] != told["beat"]:
                    self._seen[rank] = (told["beat"], now)
        return last != self._reported and left_s < 0

    def _somebody_has_time(self, now: float) -> bool:
        """Whether a rank that lives and waits for nobody is within its own limit: the others wait for it."""
        since = now - self._live_s
        live = [rank for rank, (_, read_at) in self._seen.items() if read_at > since]
        told = self._heartbeat.read_all()
        return any(not told[rank]["waits_in"] and told[rank]["without_progress_s"] < told[rank]["limit_s"]
                   for rank in live if rank in told)  # fmt: skip

    def _investigate(self) -> None:
        """Compares what all ranks tell now and a little later, so that clocks of hosts do not matter."""
        heartbeat, stalled_since = self._heartbeat, self._pulse.progress_at
        self._files.attempt(self._dump_stacks)
        known = set(self._run_dir.glob(_REPORTS))
        before, is_heard = heartbeat.read_all(), True
        for _ in range(math.ceil(_LIVE_S / self._interval_s)):
            if self._ended.wait(self._interval_s) or self._pulse.progress_at != stalled_since:
                return
            is_heard &= self._beat()
        after = heartbeat.read_all()
        # On a full disk nobody is heard, which says nothing of anybody.
        culprits = find_culprits(before, after, heartbeat.world_size) if is_heard else []
        self._reported = stalled_since
        silent = {rank for rank in range(heartbeat.world_size) if after.get(rank) == before.get(rank)}
        is_reporter = heartbeat.rank == min(set(range(heartbeat.world_size)) - silent, default=heartbeat.rank)
        if is_reporter:
            self._report(culprits, after)
        if self._config.hang_action is HangAction.abort:
            if not is_reporter:
                self._wait_for_report(known)
            logging.shutdown()
            os._exit(HANG_EXIT_CODE)

    def _wait_for_report(self, known: set[Path]) -> None:
        """Until a report is there that was not, or a while; this rank is alive meanwhile, and tells so.

        The rank that reports may have stalled a little later, and an end of this one would end it before it has
        written: by the launcher, or by the connection that it waits on.
        """
        for _ in range(math.ceil(self._live_s / self._interval_s)):
            time.sleep(self._interval_s)
            if set(self._run_dir.glob(_REPORTS)) - known:
                return
            self._beat()

    def _dump_stacks(self) -> None:
        with self._heartbeat.path(self._heartbeat.rank, "stacks.txt").open("w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(file=stream, all_threads=True)

    def _report(self, culprits: list[Culprit], beats: Beats) -> None:
        stalled_s = time.monotonic() - self._pulse.progress_at
        report = {
            "time": time.time(),
            "without_progress_s": round(stalled_s, 3),
            "limit_s": round(self.limit_s(), 3),
            "culprits": [{"why": culprit.why, **_told(beats, culprit.rank)} for culprit in culprits],
            "ranks": [dict(beats[rank]) for rank in sorted(beats)],
            "stacks": {str(rank): self._stacks_of(rank) for rank in sorted(beats)},
        }
        path = self._run_dir / time.strftime("hang-%Y%m%dT%H%M%SZ.json", time.gmtime())
        for entry in report["culprits"]:  # type: ignore[attr-defined]
            _log.error(
                "no progress for %.0f s: rank %d on %s %s; step %d, %s, micro-batch %d, at %s; see %s",
                stalled_s, entry["rank"], entry.get("host", "an unknown host"), entry["why"],
                entry.get("step", 0) + 1, entry.get("phase", "?"), entry.get("micro_batch", 0),
                entry.get("waits_in") or entry.get("at") or "an unknown place", path,
            )  # fmt: skip
        if not culprits:
            _log.error(
                "no progress for %.0f s, and it cannot be told for whom the others wait; see %s", stalled_s, path
            )
        self._files.attempt(lambda: write_whole(path, json.dumps(report, indent=1)))

    def _stacks_of(self, rank: int) -> list[str]:
        try:
            return self._heartbeat.path(rank, "stacks.txt").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []


def _told(beats: Beats, rank: int) -> dict[str, Any]:
    return dict(beats.get(rank, {"rank": rank}))
