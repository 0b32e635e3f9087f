"""A machine without a compiler trains: nothing on the road builds an extension."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

ONE_STEP = """
import sys
from pathlib import Path
from tests.distributed.layout_runs import Variant, run_layout
from tests.support.tiny import STAGE3, fp32

def build_the_shared_memory_op():
    import deepspeed
    from janus_mega.engine import deepspeed_backend

    def without_the_remedy(device):
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        return deepspeed

    deepspeed_backend._import_deepspeed = without_the_remedy

patch = build_the_shared_memory_op if sys.argv[2] == "disturbed" else None
run = run_layout(Path(sys.argv[1]), 2, fp32(), STAGE3, Variant(num_steps=1, patch=patch))
assert 4 < run.losses[0] < 6, run.losses
"""


def train_one_step(tmp_path: Path, how: str, repository: Path) -> subprocess.CompletedProcess[str]:
    """One step on two dp ranks in a fresh process that finds no program at all and no earlier build."""
    empty = tmp_path / "empty"
    empty.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "NINJA", "DS_ACCELERATOR")}
    environment = kept | {
        "PATH": str(empty),
        "PYTHONPATH": str(repository),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    command = [sys.executable, "-c", ONE_STEP, str(tmp_path), how]
    return subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )


def test_one_step_without_compiler_or_ninja(tmp_path: Path, repository: Path) -> None:
    done = train_one_step(tmp_path, "as it is", repository)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((tmp_path / "extensions").rglob("*"))


def test_trap_deepspeed_builds_its_shared_memory_op(tmp_path: Path, repository: Path) -> None:
    done = train_one_step(tmp_path, "disturbed", repository)
    assert done.returncode != 0
    assert "build_shm_op" in done.stderr
