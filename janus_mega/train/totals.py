"""What a stage has trained on so far: tokens, padding, images, labels of each task, seconds.

Totals are over the whole stage, restarts included, and are saved with every checkpoint. A rank counts only its own
micro-batches; they are summed over dp when somebody asks (a line of metrics, a save), not in every step.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist

from janus_mega.parallel.groups import ProcessGroups

_LABELS = "labels/"
_SECONDS = "seconds"


class Totals:
    """Amounts by name, as the workload measures them, and `labels/TASK`, `seconds`."""

    def __init__(self) -> None:
        self._settled: dict[str, int | float] = {}
        self._pending: dict[str, int] = defaultdict(int)

    @property
    def pending(self) -> Mapping[str, int]:
        """Amounts of this dp rank that are not in the totals yet."""
        return self._pending

    @property
    def amounts(self) -> list[str]:
        """Names that the workload measures, seen so far."""
        return [name for name in self._settled if name != _SECONDS and not name.startswith(_LABELS)]

    def add(self, amounts: Mapping[str, int]) -> None:
        """Adds amounts in a micro-batch of this dp rank."""
        for name, amount in amounts.items():
            self._pending[name] += amount

    def add_step(self, label_counts: Mapping[str, int], seconds: float) -> None:
        """Adds what all ranks know of a step: labels of the global batch by task, and its wall time."""
        for name, count in label_counts.items():
            self._settled[_LABELS + name] = self._settled.get(_LABELS + name, 0) + count
        self._settled[_SECONDS] = self._settled.get(_SECONDS, 0.0) + seconds

    def settle(self, sums: Mapping[str, int]) -> None:
        """Takes in what `pending` sums to over all dp ranks."""
        for name, amount in sums.items():
            self._settled[name] = self._settled.get(name, 0) + amount
        self._pending.clear()

    def settled(self) -> dict[str, int | float]:
        """The totals, what is pending left out."""
        return dict(self._settled)

    def read(self, groups: ProcessGroups) -> dict[str, int | float]:
        """The totals over all dp ranks. Collective over: dp (if anything is pending, which is so on all or none)."""
        if self._pending:
            names = sorted(self._pending)
            sums = torch.tensor([self._pending[name] for name in names], device=groups.device)
            dist.all_reduce(sums, group=groups.dp)
            self.settle(dict(zip(names, sums.tolist(), strict=True)))
        return self.settled()

    def restore(self, saved: Mapping[str, int | float]) -> None:
        """Goes on from what `read` gave."""
        self._settled = dict(saved)
        self._pending.clear()
