"""What was trained when: the hash of every global batch in the run's log, and the samples that were broken.

Each rank digests the rows it was given as it goes; the ranks put them together only when metrics are due, so a step
waits for nobody. `janus-mega data replay` finds the same hash on any machine from the plan alone.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.errors import UserError
from data_pipeline.schema import Hole
from data_pipeline.stream.assemble import combine_digests
from data_pipeline.stream.quarantine import QUARANTINE_FILE, Quarantine
from janus_mega.observe.lenient import Lenient, LenientLines
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.messages import gather_bytes_on_rank_0
from janus_mega.train.loop import StepEvent
from janus_mega.train.order import DataOrder

BATCHES_FILE = "batches.jsonl"
"""In the run directory: {"step": completed steps, "batch_hash": sha256 over the rows trained in the last of them}."""


class DataHook:
    """Records batches and broken samples, some steps at a time; stops the run when too many are broken."""

    def __init__(self, order: DataOrder, groups: ProcessGroups, run_dir: Path, log_every: int) -> None:
        self._order = order
        self._groups = groups
        self._lines = LenientLines(run_dir / BATCHES_FILE)
        self._log_every = log_every
        self._quarantine = Quarantine(run_dir, order.max_broken_samples) if groups.layout.rank == 0 else None
        self._holes_kept = Lenient(str(run_dir / QUARANTINE_FILE), catches_up=True)
        self._forget()

    def _forget(self) -> None:
        self._steps: list[int] = []
        self._digests: list[list[str]] = []
        self._holes: list[dict[str, Any]] = []

    def after_step(self, event: StepEvent) -> None:
        """Digests the rows of this rank; writes when due.

        Raises:
            UserError: more samples are broken than the run may have.
            Collective over: world (when due).
        """
        digests = self._order.row_digests(event.batches)
        if digests:
            self._steps.append(event.step)
            self._digests.append([digest.hex() for digest in digests])
        self._holes += [asdict(hole) for hole in self._order.holes()]
        if event.step % self._log_every == 0:
            self._write()

    def at_end(self, step: int) -> None:
        """Writes what is left. Collective over: world."""
        self._write()

    def _write(self) -> None:
        told = _of_dp_ranks(json.dumps([self._digests, self._holes]).encode(), self._groups)
        ranks = [json.loads(content) for content in told]
        if ranks and self._steps:
            hashes = [
                combine_digests([bytes.fromhex(digest) for digests, _ in ranks for digest in digests[at]])
                for at in range(len(self._steps))
            ]
            lines = zip(self._steps, hashes, strict=True)
            self._lines.append({"step": step, "batch_hash": batch_hash} for step, batch_hash in lines)
        self._forget()
        self._stop_if_exceeded([Hole(**fields) for _, holes in ranks for fields in holes])

    def _stop_if_exceeded(self, holes: list[Hole]) -> None:
        """Rank 0 keeps the record, so it decides; all ranks stop together."""
        message = None
        if self._quarantine is not None:
            quarantine = self._quarantine
            self._holes_kept.attempt(lambda: quarantine.add(holes))  # they count, written or not
            message = self._quarantine.exceeded()
        if self._any_stops(message is not None):
            raise UserError(message or "rank 0 stopped the run: too many broken samples, see its message")

    def _any_stops(self, stops: bool) -> bool:
        """Rank 0's word. Collective over: world."""
        if self._groups.layout.world_size == 1:
            return stops
        flag = torch.tensor(int(stops))
        dist.broadcast(flag, src=0, group=self._groups.host)
        return bool(flag.item())


def _of_dp_ranks(content: bytes, groups: ProcessGroups) -> list[bytes]:
    """What every dp rank gives, by rank, on rank 0; nothing elsewhere. Collective over: world (where dp is above 1)."""
    layout = groups.layout
    if layout.dp_size == 1:
        return [content] if layout.rank == 0 else []
    has_own = not (layout.tp_rank or layout.pp_rank)  # the others have the same rows
    return [part for part in gather_bytes_on_rank_0(content if has_own else b"", groups) if part]
