"""Which rank holds the others up, from what all ranks told before and after a pause; pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Beats = Mapping[int, Mapping[str, Any]]
"""Rank -> what it told last (see heartbeat)."""


@dataclass(frozen=True, slots=True)
class Culprit:
    """A rank that others wait for."""

    rank: int
    why: str


def find_culprits(before: Beats, after: Beats, world_size: int) -> list[Culprit]:
    """The ranks to look at, by the strongest sign there is.

    In this order: no sign of life; not waiting in a collective while others do, at the earliest step; fewest
    collectives begun (work on a GPU hides from the host's stack). All ranks, if nothing tells them apart.
    """
    silent = [rank for rank in range(world_size) if rank not in after or _beat(before, rank) == _beat(after, rank)]
    if silent:
        return [Culprit(rank, "its heartbeat stopped" if rank in after else "never began") for rank in silent]
    first = min(after[rank]["step"] for rank in after)
    behind = [rank for rank in sorted(after) if after[rank]["step"] == first]
    busy = [rank for rank in behind if not after[rank]["waits_in"]]
    if busy and any(after[rank]["waits_in"] for rank in after):
        return [Culprit(rank, f"is busy while others wait {_waiting(after)}") for rank in busy]
    for axis in ("world", "dp"):
        counts = {rank: after[rank]["collectives"][axis] for rank in behind}
        if len(set(counts.values())) > 1:
            lowest = min(counts.values())
            ranks = [rank for rank in behind if counts[rank] == lowest]
            return [Culprit(rank, f"has begun {lowest} collectives over {axis}, others more") for rank in ranks]
    if len(behind) < len(after):
        return [Culprit(rank, f"is at step {first}, others are further") for rank in behind]
    return [Culprit(rank, f"all ranks stand alike {_waiting(after)}".strip()) for rank in behind]


def _beat(beats: Beats, rank: int) -> int:
    return int(beats[rank]["beat"]) if rank in beats else -1


def _waiting(beats: Beats) -> str:
    collectives = sorted({str(told["waits_in"]) for told in beats.values() if told["waits_in"]})
    return f"in {', '.join(collectives)}" if collectives else ""
