"""The layouts and packed attention on CUDA: bf16 on one GPU against fp32 on the CPU, NCCL layouts against one GPU.

Ranks are started by torchrun, so this process never touches CUDA and may go on forking. Layouts are compared in bf16,
which is what GPUs train in; fp32, whose attention takes another path there, on one GPU. Bars are stated, not yet
measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.dist, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 170
NUM_GPUS = torch.cuda.device_count()  # asks the driver's library, so this process stays free to fork

AGAINST_FP32 = {"losses": 5e-3, "grad_norms": 5e-2}
IN_FP32 = {"losses": 1e-4, "grad_norms": 1e-3}
ATTENTION_BARS = {"bf16": 2e-2, "fp32": 1e-3}
PIPELINE_ONLY = 2e-4
CUT = 1e-3
"""Relative differences of bf16 runs: pipelines change no sum; tp and dp change the order of sums."""

BF16 = {"precision": "bf16"}
LAYOUTS: dict[str, tuple[int, dict[str, Any], float]] = {
    "pp2": (2, {"pp_size": 2}, PIPELINE_ONLY),
    "pp2_interleaved": (2, {"pp_size": 2, "virtual_pp_size": 2}, PIPELINE_ONLY),
    "tp2_sp": (2, {"tp_size": 2, "sequence_parallel": True}, CUT),
    "tp2_split_encoder": (2, {"tp_size": 2, "split_encoder": True, "micro_batch_size": 2}, CUT),
    "dp2_zero1": (2, {}, CUT),
    "dp2_zero2": (2, {"zero_stage": 2}, CUT),
    "dp2_zero3": (2, {"zero_stage": 3}, CUT),
    "megatron_dp2": (2, {"backend": "megatron"}, CUT),
    "dp2_pp2_recompute_full": (4, {"pp_size": 2, "recompute": "full"}, CUT),
    "tp2_pp2_sp": (4, {"tp_size": 2, "pp_size": 2, "sequence_parallel": True}, CUT),
    "tp2_dp2_sp_zero2": (4, {"tp_size": 2, "sequence_parallel": True, "zero_stage": 2}, CUT),
    "megatron_tp2_pp2_sp": (4, {"tp_size": 2, "pp_size": 2, "sequence_parallel": True, "backend": "megatron"}, CUT),
}


def need_gpus(count: int) -> None:
    if count > NUM_GPUS:
        pytest.skip(f"needs {count} CUDA devices, {NUM_GPUS} are here")


def run_ranks(out: Path, world_size: int, options: dict[str, Any], *, cuda: bool) -> dict[str, Any]:
    """What rank 0 of a job under torchrun wrote."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    if not cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    program = ["--standalone", "--nproc_per_node", str(world_size), "-m", "tests.gpu.rank_main"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *program, json.dumps(options | {"out": str(out)})],
        cwd=REPOSITORY,
        env=environment,
        timeout=TIMEOUT_S,
        check=True,
    )
    found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert found["device"] == ("cuda" if cuda else "cpu")
    return found


def train(out: Path, world_size: int, stage: str, parallel: dict[str, Any], *, cuda: bool = True) -> dict[str, Any]:
    return run_ranks(out, world_size, {"case": "train", "stage": stage, "parallel": parallel}, cuda=cuda)


def worst(found: list[float], expected: list[float]) -> float:
    """Largest relative difference; what is no number fails every comparison with a bar."""
    assert len(found) == len(expected) > 0
    differences = [abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, expected, strict=True)]
    return max(differences, key=lambda value: float("inf") if value != value else value)


@pytest.fixture(scope="module", params=["stage1", "stage3"])
def one_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    need_gpus(1)
    return request.param, train(tmp_path_factory.mktemp("one"), 1, request.param, BF16)


def test_the_reference_program_trains(tmp_path: Path) -> None:
    """Needs no GPU: what the other tests start is known to run."""
    found = train(tmp_path, 1, "stage3", {}, cuda=False)
    assert len(found["losses"]) == 5 and all(0 < loss < 10 for loss in found["losses"])


@pytest.mark.parametrize("precision", ATTENTION_BARS)
def test_packed_attention_equals_the_cpu(precision: str, tmp_path: Path) -> None:
    need_gpus(1)
    options = {"case": "attend", "precision": precision}
    expected = run_ranks(tmp_path / "cpu", 1, options, cuda=False)
    found = run_ranks(tmp_path / "cuda", 1, options, cuda=True)
    for name in ("out", "query", "key", "value"):
        a, b = torch.tensor(found[name]), torch.tensor(expected[name])
        assert ((a - b).norm() / b.norm()).item() <= ATTENTION_BARS[precision], name


def test_one_gpu_in_fp32_equals_the_cpu(tmp_path: Path) -> None:
    need_gpus(1)
    found, expected = (train(tmp_path / str(cuda), 1, "stage3", {}, cuda=cuda) for cuda in (True, False))
    for name, bar in IN_FP32.items():
        assert worst(found[name], expected[name]) <= bar, name


def test_one_gpu_in_bf16_follows_the_cpu_in_fp32(one_gpu: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    stage, found = one_gpu
    expected = train(tmp_path, 1, stage, {}, cuda=False)
    for name, bar in AGAINST_FP32.items():
        assert worst(found[name], expected[name]) <= bar, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_nccl_layouts_equal_one_gpu(name: str, one_gpu: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    stage, expected = one_gpu
    world_size, parallel, bar = LAYOUTS[name]
    need_gpus(world_size)
    found = train(tmp_path, world_size, stage, BF16 | parallel)
    for figure in ("losses", "grad_norms"):
        assert worst(found[figure], expected[figure]) <= bar, figure
