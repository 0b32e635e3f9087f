"""Shared by all tests: one thread per process, fixed seeds, a scratch run directory.

Thread counts are set in the environment before anything imports torch or numpy: tests fork ranks, and a forked parent
must never have run a multi-threaded operation.
"""

import os

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import random
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


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
