"""Shared by all tests: one thread per process, fixed seeds, a scratch run directory.

Thread counts are set in the environment before anything imports torch or numpy: tests fork ranks, and a forked parent
must never have run a multi-threaded operation.
"""

import os

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import random
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.support.picked import EVERY, layout_seed

REPOSITORY = Path(__file__).resolve().parents[1]


SELDOM_SHARE = 3
"""Of the tests marked `seldom` every commit picks one in so many."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out the cases marked `seldom` that the commit has not picked."""
    if EVERY:
        return
    seed = layout_seed()
    for item in items:
        if item.get_closest_marker("seldom") and zlib.crc32(f"{seed} {item.nodeid}".encode()) % SELDOM_SHARE:
            item.add_marker(
                pytest.mark.skip(f"JANUS_LAYOUT_SEED={seed} has not picked it; JANUS_LAYOUTS=all runs every one")
            )


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same seeds; torch is seeded only where something has imported it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third parties draw from the legacy generator
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An empty run directory."""
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY
