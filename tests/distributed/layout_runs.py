"""Runs the tiny workload in some layout, as it is or with something changed, and tells what tests compare."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from janus_mega.config.schema import LossConfig, ModelConfig, Module, ParallelConfig
from janus_mega.engine.state import moment_slices, weight_slices
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.parallel.slices import Slice, assemble_all
from janus_mega.train.run import build_engine
from janus_mega.train.workload import BuiltModel
from tests.support.encoder_calls import EncoderCalls, StepCalls, expected_calls
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import TinyWorkload, tiny_recipe

import_what_ranks_need()

NUM_STEPS = 5
WEIGHT_STEPS = 5
BARS = {
    "loss": 5e-6,  # measured worst 1.4e-7
    "norm": 1e-5,  # measured worst 2e-7
    "gradients": 1e-5,  # measured worst 6e-7
    "weights": 1e-5,  # measured worst 3e-6
}
"""What `compare` may find between two fp32 layouts; measured over all layouts of test_layouts."""


@dataclass(frozen=True)
class Variant:
    """What is different in a run besides its layout."""

    model: ModelConfig | None = None
    num_steps: int = NUM_STEPS
    patch: Callable[[], None] | None = None
    """Called in every rank before anything is built: takes a remedy away."""
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    """Of weights and batches."""
    timeout_s: float = 120.0


@dataclass
class LayoutRun:
    """What a run shows: per step, and as whole tensors by global name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """exp_avg after one update: (1 - beta1) times the clipped gradient."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After WEIGHT_STEPS updates (or the last)."""
    encoder_calls: list[list[StepCalls]] = field(default_factory=list)
    """By rank and step."""
    num_graphs: list[int] = field(default_factory=list)
    """By rank: what torch.compile made of layers that were called."""


AS_IT_IS = Variant()


def run_layout(
    tmp_path: Path,
    world_size: int,
    parallel: ParallelConfig,
    trainable: tuple[Module, ...],
    variant: Variant = AS_IT_IS,
) -> LayoutRun:
    """Trains in forked ranks and gathers what they saw."""
    ranks = results_of_ranks(_train, world_size, tmp_path, parallel, trainable, variant, timeout_s=variant.timeout_s)
    gather = {
        key: assemble_all(Slice(*piece) for rank in ranks for piece in rank[key]) for key in ("gradients", "weights")
    }
    seen = {key: [rank[key] for rank in ranks] for key in ("encoder_calls", "num_graphs")}
    return LayoutRun(ranks[0]["losses"], ranks[0]["grad_norms"], **gather, **seen)


def _train(tmp_path: Path, parallel: ParallelConfig, trainable: tuple[Module, ...], variant: Variant) -> dict[str, Any]:
    if variant.patch:
        variant.patch()
    groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
    workload = TinyWorkload(trainable, parallel, variant.model)
    workload.loss, workload.seed = variant.loss, variant.seed
    recipe = tiny_recipe(tmp_path, parallel, variant.num_steps, **variant.optimizer)
    calls = _watched_encoder(workload)
    engine, shards = build_engine(workload, recipe, groups)
    layout = groups.layout
    found: dict[str, Any] = {"losses": [], "grad_norms": []}
    for step, batches in enumerate(workload.batches(layout.dp_rank, layout.dp_size, 0, variant.num_steps), start=1):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        calls[0].begin_step()
        result = engine.train_step([workload.place(batch, groups) for batch in batches], counts, lr=1e-3)
        found["losses"].append(result.loss)
        found["grad_norms"].append(result.grad_norm)
        if step == 1:
            moments = (piece for piece in moment_slices(engine, shards) if piece.name.startswith("optimizer.exp_avg/"))
            found["gradients"] = [_plain(piece) for piece in moments]
        if step == min(WEIGHT_STEPS, variant.num_steps):
            found["weights"] = [_plain(piece) for piece in weight_slices(engine, shards)]
    return found | {"encoder_calls": calls[0].steps, "num_graphs": counters["stats"]["unique_graphs"]}


def _watched_encoder(workload: TinyWorkload) -> list[EncoderCalls]:
    """Filled when the workload builds its model."""
    build, calls = workload.build, list[EncoderCalls]()

    def build_watched(groups: ProcessGroups) -> BuiltModel:
        built = build(groups)
        calls.append(EncoderCalls(built.chunks[0]))
        return built

    workload.build = build_watched  # type: ignore[method-assign]
    return calls


def assert_options_acted(run: LayoutRun, parallel: ParallelConfig) -> None:
    """That the encoder ran where and on as many images as configured, and layers were compiled if they should be."""
    world_size = len(run.encoder_calls)
    for rank, steps in enumerate(run.encoder_calls):
        assert steps == expected_calls(parallel, world_size, rank, len(run.losses)), rank
    assert [num_graphs > 0 for num_graphs in run.num_graphs] == [parallel.compile] * world_size, run.num_graphs


def _plain(piece: Slice) -> tuple[str, tuple[int, ...], tuple[int, ...], Tensor]:
    return piece.name, piece.global_shape, piece.offset, piece.tensor.clone()


KEY_BIAS = "k_proj.bias"
"""The encoder's key biases shift all scores of a query alike, so their gradient is zero in exact arithmetic; what is
computed is rounding, and AdamW makes full-sized steps of it. They are left out of the comparison by name."""


def compare(run: LayoutRun, expected: LayoutRun) -> dict[str, float]:
    """Relative differences by the keys of BARS, the worst over steps and tensors; a run may be shorter than expected,
    weights are then left out."""
    num_steps = len(run.losses)
    figures = {
        "loss": step_difference(run.losses, expected.losses[:num_steps]),
        "norm": step_difference(run.grad_norms, expected.grad_norms[:num_steps]),
        "gradients": difference(run.gradients, expected.gradients),
    }
    if num_steps >= WEIGHT_STEPS:
        figures["weights"] = difference(run.weights, expected.weights)
    return figures


def over_bar(figures: dict[str, float]) -> float:
    """How many times the bar the worst figure is."""
    return max(value / BARS[key] for key, value in figures.items())


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest over tensors of |difference| / |expected| (Frobenius); names must agree."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if not name.endswith(KEY_BIAS)]
    return _worst(((found[name] - expected[name]).norm().item(), expected[name].norm().item()) for name in names)


def step_difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference over steps (an expected zero, as in text-only steps of stage I, must be met)."""
    return _worst((abs(a - b), abs(b)) for a, b in zip(found, expected, strict=True))


def _worst(differences: Iterable[tuple[float, float]]) -> float:
    """Largest ratio of (difference, size) pairs; infinite if one is not a number, which `max` alone would pass over."""
    ratios = [distance / (size or 1.0) for distance, size in differences]
    return math.inf if any(math.isnan(ratio) for ratio in ratios) else max(ratios)
