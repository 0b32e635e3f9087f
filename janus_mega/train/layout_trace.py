"""What a layout shows of a few steps, and how far that is from what one process showed.

Loss and gradient norm are numbers every rank has. Gradients are told by AdamW's first moment: m_k - beta1 m_(k-1) is
(1 - beta1) times the clipped gradient, whichever backend and ZeRO stage holds it, and each of its elements is told by
exactly one rank, so a module's norm is one sum over the world. Weights are compared piece by piece with the whole
tensors of the one process, which also shows a piece that no rank holds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from janus_mega.engine.interface import StatefulEngine
from janus_mega.engine.state import moment_slices, weight_slices
from janus_mega.models.janus import MODULE_ATTRIBUTES
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.groups import build_groups
from janus_mega.parallel.slices import Slice, assemble_all, index_of
from janus_mega.train.janus import JanusWorkload, recipe_of
from janus_mega.train.run import build_engine

FIRST_MOMENT = "optimizer.exp_avg/"

KEY_BIAS = "k_proj.bias"
"""The encoder's key biases shift all scores of a query alike, so their gradient is zero in exact arithmetic; what is
computed is rounding, and AdamW makes full-sized steps of it. They are left out of the comparison of weights."""


@dataclass(slots=True)
class Trace:
    """What a layout shows, step after step; equal on all ranks."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    module_norms: dict[str, list[float]] = field(default_factory=dict)
    """Norm of each trained module's clipped gradient."""


@dataclass(frozen=True, slots=True)
class Deviations:
    """How far a layout is from one process: relative differences, infinite where something is not a number."""

    loss: float
    norm: float
    modules: dict[str, float]
    """Of each module's gradient norm, against the largest that the module had in any step."""
    weights: dict[str, float]
    """Of each tensor after the last step: norm of the difference over its norm."""


def trace_steps(workload: JanusWorkload, num_steps: int) -> tuple[Trace, list[Slice]]:
    """Trains `num_steps` on the ranks of the joined job; returns what showed and this rank's pieces of the weights.

    Collective over: world.
    """
    config = workload.config
    parallel = config.parallel
    groups = build_groups(parallel.tp_size, parallel.pp_size, config.seed, parallel.virtual_pp_size)
    engine, shards = build_engine(workload, recipe_of(config), groups)
    layout = groups.layout
    names = [module.value for module in config.stage.trainable]
    trace = Trace(module_norms={name: [] for name in names})
    norms = _ModuleNorms(engine, shards, names, config.optimizer.beta1)
    for batches in workload.batches(layout.dp_rank, layout.dp_size, 0, num_steps):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        step = engine.train_step([workload.place(batch, groups) for batch in batches], counts, config.optimizer.lr)
        trace.losses.append(step.loss)
        trace.grad_norms.append(step.grad_norm)
        for name, norm in norms.after_step().items():
            trace.module_norms[name].append(norm)
    return trace, list(weight_slices(engine, shards))


class _ModuleNorms:
    """Norms of each module's gradient, recovered from the first moment."""

    def __init__(
        self, engine: StatefulEngine, shards: Iterable[ShardedParameter], modules: list[str], beta1: float
    ) -> None:
        self._engine = engine
        self._shards = list(shards)
        self._modules = modules
        self._beta1 = beta1
        self._before: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def after_step(self) -> dict[str, float]:
        """Norm by module. Collective over: world."""
        sums = torch.zeros(len(self._modules), dtype=torch.float64)
        for piece in moment_slices(self._engine, self._shards):
            if not piece.name.startswith(FIRST_MOMENT):
                continue
            key, now = (piece.name, piece.offset), piece.tensor.detach().double().cpu()
            gradient = (now - self._beta1 * self._before.get(key, torch.zeros(()))) / (1 - self._beta1)
            sums[self._modules.index(_module_of(piece.name))] += gradient.square().sum()
            self._before[key] = now.clone()
        summed = _over_world(sums, self._engine)
        return {name: math.sqrt(value) for name, value in zip(self._modules, summed.tolist(), strict=True)}


def _module_of(name: str) -> str:
    attribute = name.removeprefix(FIRST_MOMENT).split(".", 1)[0]
    return next(module.value for module, held in MODULE_ATTRIBUTES.items() if held == attribute)


def _over_world(values: Tensor, engine: StatefulEngine) -> Tensor:
    on_device = values.to(engine.groups.device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def save_reference(path: Path, trace: Trace, pieces: Iterable[Slice]) -> None:
    """Writes what one process showed."""
    torch.save({"trace": asdict(trace), "weights": assemble_all(_copied(pieces))}, path)


def load_reference(path: Path) -> tuple[Trace, dict[str, Tensor]]:
    """What `save_reference` wrote."""
    found = torch.load(path, weights_only=True)
    return Trace(**found["trace"]), found["weights"]


def _copied(pieces: Iterable[Slice]) -> list[Slice]:
    return [Slice(p.name, p.global_shape, p.offset, p.tensor.detach().cpu().clone()) for p in pieces]


def deviations(
    trace: Trace, pieces: Iterable[Slice], expected: Trace, weights: Mapping[str, Tensor], device: torch.device
) -> Deviations:
    """Compares a layout with one process; equal on all ranks. Collective over: world."""
    return Deviations(
        loss=_worst(trace.losses, expected.losses),
        norm=_worst(trace.grad_norms, expected.grad_norms),
        modules={
            name: _worst(norms, expected.module_norms[name], max(expected.module_norms[name]))
            for name, norms in trace.module_norms.items()
        },
        weights=_weight_differences(pieces, weights, device),
    )


def _weight_differences(
    pieces: Iterable[Slice], weights: Mapping[str, Tensor], device: torch.device
) -> dict[str, float]:
    order = {name: number for number, name in enumerate(sorted(weights))}
    sums = torch.zeros(2, len(order), dtype=torch.float64)  # squared differences, and elements that were told
    for piece in pieces:
        expected = weights[piece.name][index_of(piece.box)]
        found = piece.tensor.detach().cpu()
        sums[0, order[piece.name]] += (found.double() - expected.double()).square().sum()
        sums[1, order[piece.name]] += found.numel()
    sums = sums.to(device)
    dist.all_reduce(sums)
    differences = {}
    for name, number in order.items():
        squared, told = sums[:, number].tolist()
        size = float(weights[name].double().norm()) or 1.0
        whole = told == weights[name].numel() and not math.isnan(squared)
        differences[name] = math.sqrt(squared) / size if whole else math.inf
    return {name: value for name, value in differences.items() if not name.endswith(KEY_BIAS)}


def _worst(found: list[float], expected: list[float], scale: float = 0.0) -> float:
    """Largest relative difference over steps; `scale` 0 takes each step's own size (1 where that is 0)."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        difference = abs(a - b) / (scale or abs(b) or 1.0)
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst
