"""Which of many alike cases a run of the tests takes: some always, and a few that the commit picks.

JANUS_LAYOUT_SEED picks others, JANUS_LAYOUTS=all takes every one.
"""

import os
import random
from collections.abc import Collection, Iterable, Set
from typing import TypeVar

import pytest

from tests.support.seeds import seed_of

EVERY = os.environ.get("JANUS_LAYOUTS") == "all"
NUM_PICKED_BESIDE = 2
Case = TypeVar("Case")


def layout_seed() -> int:
    """What picks: JANUS_LAYOUT_SEED, or the commit, so that tests of one commit repeat and commits differ."""
    return seed_of("JANUS_LAYOUT_SEED")


def picked_beside(always: Set[Case], cases: Iterable[Case], seed: int) -> set[Case]:
    """A few of the other cases by a seed."""
    return set(random.Random(seed).sample([case for case in cases if case not in always], NUM_PICKED_BESIDE))


def skip_unless_taken(case: Case, taken: Collection[Case]) -> None:
    """Skips the test of a case that this run does not take."""
    if not EVERY and case not in taken:
        names = ", ".join(sorted("/".join(one) if isinstance(one, tuple) else str(one) for one in taken))
        pytest.skip(f"JANUS_LAYOUT_SEED={layout_seed()} takes {names}; JANUS_LAYOUTS=all takes every one")
