"""Ends a run whose ranks no longer hold the same values, naming the rank, before the update that would learn from it.

It looks right before every n-th update, and before one that is refused: a flipped exponent is a likely cause of values
that are no numbers. Nothing is saved then: what was published since the last check without a difference is suspect.
"""

import json
import socket
import time
from pathlib import Path

from janus_mega.engine.replicas import Replicas
from janus_mega.observe.lenient import Lenient, write_whole
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.messages import gather_bytes
from janus_mega.train.exits import ReplicasDiffer
from janus_mega.train.loop import StepEvent

_NAMES_TOLD = 3


class ReplicaHook:
    """Asks `Replicas` every few steps; sets the engine's `before_update`."""

    def __init__(self, replicas: Replicas, groups: ProcessGroups, every: int, run_dir: Path, first_step: int) -> None:
        self._replicas = replicas
        self._groups = groups
        self._every = every
        self._run_dir = run_dir
        self._step = first_step
        self._equal_at = first_step
        """Step whose end the weights were from when they were last found equal."""
        replicas.note_published()
        replicas.engine.before_update = self.look

    def after_step(self, event: StepEvent) -> None:
        """Keeps count; weights that have no other truth are looked at while they are fresh."""
        self._step = event.step
        self._replicas.note_published()

    def at_end(self, step: int) -> None:
        """Nothing is left to do."""

    def look(self, is_refused: bool) -> None:
        """Looks when due. Collective over: world (when due).

        Raises:
            ReplicasDiffer: on every rank, with the same message.
        """
        if not is_refused and (self._step + 1) % self._every:
            return
        if self._replicas.differ():
            self._end()
        self._equal_at = self._step

    def _end(self) -> None:
        rank, host = self._groups.layout.rank, socket.gethostname()
        odd = [{"name": odd.parameter, "why": odd.why} for odd in self._replicas.find_odd()]
        mine = json.dumps({"rank": rank, "host": host, "parameters": odd}).encode()
        told_by_all = [json.loads(told) for told in gather_bytes(mine, self._groups)]
        ranks = [told for told in told_by_all if told["parameters"]]
        path = self._run_dir / time.strftime("replicas-%Y%m%dT%H%M%SZ.json", time.gmtime())
        suspect = [self._equal_at + 1, self._step]
        if rank == 0:
            report = {"time": time.time(), "step": self._step + 1, "equal_after_step": self._equal_at,
                      "suspect_steps": suspect if suspect[0] <= suspect[1] else [], "ranks": ranks}  # fmt: skip
            Lenient(str(path)).attempt(lambda: write_whole(path, json.dumps(report, indent=1)))
        who = "; ".join(f"rank {told['rank']} on {told['host']}: {_names(told['parameters'])}" for told in ranks)
        since = f"steps {suspect[0]} to {suspect[1]} are suspect" if suspect[0] <= suspect[1] else "no step is suspect"
        raise ReplicasDiffer(
            f"before the update of step {self._step + 1} ranks hold other values than they should: {who}; nothing was "
            f"saved, {since}; see {path}, keep the host out and start again"
        )


def _names(parameters: list[dict[str, str]]) -> str:
    told = ", ".join(f"{parameter['name']} ({parameter['why']})" for parameter in parameters[:_NAMES_TOLD])
    more = len(parameters) - _NAMES_TOLD
    return f"{told} and {more} more" if more > 0 else told
