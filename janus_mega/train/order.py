"""The order of a run's data as the loop sees it: an identity, a position, and a hash of what was trained.

The order itself is a pure function of the plan; nothing here decides what comes next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from data_pipeline.plan.plan import Plan
from data_pipeline.stream.loader import row_digests


class DataOrder(Protocol):
    """Which batch comes when."""

    digest: str
    """Identity of the order; a resume under another is refused."""

    def cursor(self, step: int) -> dict[str, Any]:
        """State (JSON values) from which the batches after `step` steps are found at once; may be empty."""

    def restore(self, cursor: dict[str, Any]) -> None:
        """Accepts what `cursor` gave in this or another process."""

    def row_digests(self, batches: Sequence[Any]) -> list[bytes]:
        """32 bytes for each row of some micro-batches; empty where rows have no hash."""


@dataclass
class FixedOrder:
    """An order that needs no state, of rows without hashes."""

    digest: str

    def cursor(self, step: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, cursor: dict[str, Any]) -> None:
        """Nothing to do."""

    def row_digests(self, batches: Sequence[Any]) -> list[bytes]:
        """None."""
        return []


class PlannedOrder:
    """The order of a compiled plan."""

    def __init__(self, plan: Plan) -> None:
        self.digest = plan.digest
        self._plan = plan

    def cursor(self, step: int) -> dict[str, Any]:
        """The plan's state before the window that step `step` lies in."""
        return self._plan.cursor_at(step)

    def restore(self, cursor: dict[str, Any]) -> None:
        """Lets the plan go on from a saved state."""
        if cursor:
            self._plan.restore(cursor)

    def row_digests(self, batches: Sequence[dict[str, Tensor]]) -> list[bytes]:
        """sha256 of each row."""
        return row_digests(batches)
