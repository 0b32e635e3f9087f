"""Runs the tiny workload in some layout and tells what the parity tests compare."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from janus_mega.config.schema import Module, ParallelConfig
from janus_mega.engine.state import moment_slices, weight_slices
from janus_mega.parallel.forked import run_ranks
from janus_mega.parallel.groups import build_groups
from janus_mega.parallel.slices import Slice, assemble_all
from janus_mega.train.run import build_engine
from tests.support.tiny import TinyWorkload, tiny_recipe


@dataclass
class LayoutRun:
    """What a run shows: per step, and as whole tensors by global name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """exp_avg after one update: (1 - beta1) times the clipped gradient."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After WEIGHT_STEPS updates."""


NUM_STEPS = 5
WEIGHT_STEPS = 3


def run_layout(
    tmp_path: Path, world_size: int, parallel: ParallelConfig, trainable: tuple[Module, ...], **optimizer: float
) -> LayoutRun:
    """Trains NUM_STEPS steps in forked ranks and gathers what they saw."""
    run_ranks(_train, world_size, tmp_path, parallel, trainable, optimizer, timeout_s=120)
    losses, norms = pickle.loads((tmp_path / "steps").read_bytes())  # written by our own ranks a moment ago
    parts = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("slices-*"))]
    gather = {
        key: assemble_all(Slice(*piece) for part in parts for piece in part[key]) for key in ("gradients", "weights")
    }
    return LayoutRun(losses, norms, **gather)


def _train(
    tmp_path: Path, parallel: ParallelConfig, trainable: tuple[Module, ...], optimizer: dict[str, float]
) -> None:
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    workload = TinyWorkload(trainable, parallel)
    engine, shards = build_engine(workload, tiny_recipe(tmp_path, parallel, NUM_STEPS, **optimizer), groups)
    layout = groups.layout
    found: dict[str, list] = {}
    losses, norms = [], []
    for step, batches in enumerate(workload.batches(layout.dp_rank, layout.dp_size, 0, NUM_STEPS), start=1):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        result = engine.train_step([workload.place(batch, groups) for batch in batches], counts, lr=1e-3)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 1:
            moments = (piece for piece in moment_slices(engine, shards) if piece.name.startswith("optimizer.exp_avg/"))
            found["gradients"] = [_plain(piece) for piece in moments]
        if step == WEIGHT_STEPS:
            found["weights"] = [_plain(piece) for piece in weight_slices(engine, shards)]
    torch.save(found, tmp_path / f"slices-{layout.rank}")
    if layout.rank == 0:
        (tmp_path / "steps").write_bytes(pickle.dumps((losses, norms)))
    dist.barrier()


def _plain(piece: Slice) -> tuple[str, tuple[int, ...], tuple[int, ...], Tensor]:
    return piece.name, piece.global_shape, piece.offset, piece.tensor.clone()


KEY_BIAS = "k_proj.bias"
"""The encoder's key biases shift all scores of a query alike, so their gradient is zero in exact arithmetic; what is
computed is rounding, and AdamW makes full-sized steps of it. They are left out of the comparison by name."""


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest over tensors of |difference| / |expected| (Frobenius); names must agree."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        if not name.endswith(KEY_BIAS):
            size = tensor.norm().item()
            worst = max(worst, (found[name] - tensor).norm().item() / (size or 1.0))
    return worst


def step_difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference over steps (an expected zero, as in text-only steps of stage I, must be met)."""
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, expected, strict=True))
