"""Crashes everywhere in a recording: plays a scene, goes through the states and counts what breaks a rule."""

import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from janus_mega.checkpoint.disk import Disk
from tests.support.crash_disk import Recording
from tests.support.crash_rules import Rules
from tests.support.crash_states import crash_points
from tests.support.crash_traces import Scene
from tests.support.seeds import fault_seed

ALL = os.environ.get("JANUS_FAULTS") == "all"
"""Whether everything is gone through, as `make test-faults` does, and not a fifth."""
SEED = fault_seed()
"""Chooses the fifth, and everything else that is left to chance: JANUS_FAULT_SEED, or the commit."""
FAST_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Memory, where there is some to write into: what matters here is order, not the disk."""
Case = TypeVar("Case")


def share(cases: Iterable[Case]) -> list[Case]:
    """All cases, or every fifth, beginning where the seed says."""
    listed = list(cases)
    return listed if ALL else listed[SEED % 5 :: 5] or listed[:1]


def of_all(count: int) -> int:
    """A number of trials, or a fifth of it."""
    return count if ALL else -(-count // 5)


def record(
    play: Callable[[Scene], object],
    base: Path,
    world_size: int = 1,
    make_disk: Callable[[Recording, int], Disk] = Recording.disk,
) -> Scene:
    """Plays a scene in an empty folder, and ends all ranks where one cannot go on."""
    scene = Scene(base, world_size, make_disk)
    try:
        play(scene)
    except Exception as error:
        scene.problems.append(f"{type(error).__name__}: {error}")
    return scene


@dataclass
class Campaign:
    """Counts over many recordings."""

    num_states: int = 0
    num_points: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: "Campaign") -> None:
        """Counts what another has gone through."""
        self.num_states += other.num_states
        self.num_points += other.num_points
        self.violations += other.violations

    def run(self, scene: Scene, chance: random.Random, *, budget: int, stop_at: int = 20) -> None:
        """Crashes everywhere in one order of a recording, until so many violations were seen."""
        rules = Rules(scene.written)
        self.violations += scene.problems
        for point in crash_points(scene.recording.other_order(chance)):
            self.num_points += 1
            for state in point.states(chance, budget):
                self.num_states += 1
                for violation in rules.violations(point, state):
                    self.violations.append(f"after operation {point.number} ({point.operation.kind}): {violation}")
                    if len(self.violations) == stop_at:
                        return
