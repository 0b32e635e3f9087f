"""What was trained when: the hash of every global batch, in the run's log.

Each rank digests the rows it was given as it goes; the ranks put them together only when metrics are due, so a step
waits for nobody. `janus-mega data replay` finds the same hash on any machine from the plan alone.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.stream.assemble import combine_digests
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.loop import StepEvent
from janus_mega.train.order import DataOrder

BATCHES_FILE = "batches.jsonl"
"""In the run directory: {"step": completed steps, "batch_hash": sha256 over the rows trained in the last of them}."""
_DIGEST_BYTES = 32


class DataHook:
    """Writes the hash of every global batch, some steps at a time."""

    def __init__(self, order: DataOrder, groups: ProcessGroups, run_dir: Path, log_every: int) -> None:
        self._order = order
        self._groups = groups
        self._path = run_dir / BATCHES_FILE
        self._log_every = log_every
        self._steps: list[int] = []
        self._digests: list[list[bytes]] = []

    def after_step(self, event: StepEvent) -> None:
        """Digests the rows of this rank; writes when due. Collective over: dp (when due)."""
        digests = self._order.row_digests(event.batches)
        if not digests:
            return
        self._steps.append(event.step)
        self._digests.append(digests)
        if event.step % self._log_every == 0:
            self._write()

    def at_end(self, step: int) -> None:
        """Writes what is left. Collective over: dp."""
        if self._steps:
            self._write()

    def _write(self) -> None:
        """Gathers the digests of all ranks, [steps, rows per rank, 32] each."""
        content = bytearray(b"".join(digest for step in self._digests for digest in step))
        own = torch.frombuffer(content, dtype=torch.uint8).to(self._groups.device)
        gathered = [torch.empty_like(own) for _ in range(self._groups.layout.dp_size)]
        dist.all_gather(gathered, own, group=self._groups.dp)
        if self._groups.layout.rank == 0:
            ranks = [rank.cpu().numpy().reshape(len(self._steps), -1, _DIGEST_BYTES) for rank in gathered]
            with self._path.open("a", encoding="utf-8") as stream:
                for at, step in enumerate(self._steps):
                    rows = [row.tobytes() for rank in ranks for row in rank[at]]
                    stream.write(json.dumps({"step": step, "batch_hash": combine_digests(rows)}) + "\n")
        self._steps, self._digests = [], []
