"""What tests leave to chance, the commit picks: tests of one commit repeat, and commits differ in what they try."""

import os
import subprocess
from functools import cache
from pathlib import Path

NUM_FAULT_SEEDS = 5
"""Of these, each takes another fifth of the campaign of faults."""


def seed_of(variable: str) -> int:
    """The seed that an environment variable names, or the commit's; 0 where there is no commit to ask."""
    given = os.environ.get(variable)
    return _commit() if given is None else int(given)


def fault_seed() -> int:
    """What chooses faults: JANUS_FAULT_SEED, or the commit modulo five, so that five seeds are all there are to try."""
    given = os.environ.get("JANUS_FAULT_SEED")
    return _commit() % NUM_FAULT_SEEDS if given is None else int(given)


@cache
def _commit() -> int:
    asked = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return int(asked.stdout, 16) if asked.returncode == 0 else 0
