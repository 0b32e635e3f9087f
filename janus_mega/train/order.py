"""The order of a run's data as the loop sees it: an identity, a position, and what was found in a step.

The order itself is a pure function of the plan; nothing here decides what comes next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from data_pipeline.explain.blame import blame_step
from data_pipeline.plan.difference import IDENTITY_FILE, difference, load_identity, save_identity
from data_pipeline.plan.open import OpenData
from data_pipeline.schema import Hole
from data_pipeline.stream.loader import StepLoader, build_loader, row_digests


class DataOrder(Protocol):
    """Which batch comes when."""

    digest: str
    """Identity of the order; a resume under another is refused."""
    max_broken_samples: int
    """Broken samples, over all ranks, that a run may have."""

    def cursor(self, step: int) -> dict[str, Any]:
        """State (JSON values) from which the batches after `step` steps are found at once; may be empty."""

    def restore(self, cursor: dict[str, Any]) -> None:
        """Accepts what `cursor` gave in this or another process."""

    def differences(self, run_dir: Path) -> list[str]:
        """What is different from the order that an earlier start in the directory kept; empty where it kept none."""

    def keep(self, run_dir: Path) -> None:
        """Keeps beside the run what the order was made of."""

    def source_tokens(self, first_step: int, last_step: int) -> dict[str, int]:
        """Tokens of each source in the batches after `first_step` up to `last_step` steps, as planned; may be empty."""

    def samples(self, step: int) -> list[dict[str, Any]]:
        """What was in the batch of a step, counted from 1: source, uid and row of each document, with sources."""

    def row_digests(self, batches: Sequence[Any]) -> list[bytes]:
        """32 bytes for each row of some micro-batches; empty where rows have no hash."""

    def holes(self) -> Sequence[Hole]:
        """Broken samples among the batches of this rank in the step that was given last."""


@dataclass
class FixedOrder:
    """An order that needs no state, of rows without hashes."""

    digest: str
    max_broken_samples: int = 0

    def cursor(self, step: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, cursor: dict[str, Any]) -> None:
        """Nothing to do."""

    def differences(self, run_dir: Path) -> list[str]:
        """Not known."""
        return []

    def keep(self, run_dir: Path) -> None:
        """Nothing to keep."""

    def source_tokens(self, first_step: int, last_step: int) -> dict[str, int]:
        """Nothing: there are no sources."""
        return {}

    def samples(self, step: int) -> list[dict[str, Any]]:
        """None have names."""
        return []

    def row_digests(self, batches: Sequence[Any]) -> list[bytes]:
        """None."""
        return []

    def holes(self) -> Sequence[Hole]:
        """None: what is broken stops the run."""
        return ()


class PlannedOrder:
    """The order of a compiled plan, and the loader that follows it."""

    def __init__(self, data: OpenData) -> None:
        self.digest = data.plan.digest
        self.max_broken_samples = data.spec.max_broken_samples
        self._data = data
        self._loader: StepLoader | None = None

    def load(
        self, *, micro_batch_size: int, dp_rank: int, dp_size: int, first_step: int, last_step: int
    ) -> Iterator[list[dict[str, Tensor]]]:
        """One dp rank's micro-batches, step after step, as far as the plan goes."""
        self._loader = build_loader(
            self._data,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            first_step=first_step,
            num_steps=last_step - first_step,
        )
        return iter(self._loader)

    def cursor(self, step: int) -> dict[str, Any]:
        """The plan's state before the window that step `step` lies in."""
        return self._data.plan.cursor_at(step)

    def restore(self, cursor: dict[str, Any]) -> None:
        """Lets the plan go on from a saved state."""
        if cursor:
            self._data.plan.restore(cursor)

    def differences(self, run_dir: Path) -> list[str]:
        """Which source, which field, both values."""
        if not (run_dir / IDENTITY_FILE).exists():
            return []
        return difference(load_identity(run_dir), self._data.plan.identity, ("the run's", "now"))

    def keep(self, run_dir: Path) -> None:
        """Writes plan.json."""
        save_identity(self._data.plan, run_dir / IDENTITY_FILE)

    def source_tokens(self, first_step: int, last_step: int) -> dict[str, int]:
        """By the plan alone, so broken samples count as if they were whole; every source has an entry."""
        plan = self._data.plan
        rows = plan.rows(range(first_step * plan.global_batch_size, last_step * plan.global_batch_size))
        tokens = np.bincount(rows.source_no, weights=rows.length, minlength=len(plan.sources))
        return {source.name: int(count) for source, count in zip(plan.sources, tokens, strict=True)}

    def samples(self, step: int) -> list[dict[str, Any]]:
        """From the plan; goes to the sources' indexes."""
        documents = blame_step(self._data, step)
        return [{"source": found.source, "uid": found.uid, "row": found.row} for found in documents]

    def row_digests(self, batches: Sequence[dict[str, Tensor]]) -> list[bytes]:
        """sha256 of each row."""
        return row_digests(batches)

    def holes(self) -> Sequence[Hole]:
        """What the loader met."""
        return self._loader.holes if self._loader else ()
