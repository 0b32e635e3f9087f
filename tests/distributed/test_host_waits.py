"""A step waits for its device once: for the norm, which decides about the update; see tests/support/host_waits.py."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_mega.config.schema import Backend, ParallelConfig, Precision
from janus_mega.engine.guards import ZeroGuard
from janus_mega.parallel.groups import build_groups
from janus_mega.train import run as run_module
from janus_mega.train.hooks.checkpoints import CheckpointHook
from janus_mega.train.run import build_engine
from tests.support.host_waits import HostWaits
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist
import_what_ranks_need()

NUM_STEPS = 2

DEVICE = torch.device("cpu")
"""So spelt it is the device; "cpu" is the host."""


class _ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[gradient > 0].sum() + gradient


def backward(values: Tensor) -> None:
    _ReadInBackward.apply(values.clone().requires_grad_()).sum().backward()


def filled(values: Tensor) -> Tensor:
    values[values > 1] = 0.0
    return values


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: 1 if x.any() else 0,
    "in": lambda x: 1.0 in x,
    "int": lambda x: int(x[0]),
    "slice to a tensor": lambda x: x[: x.argmax()],
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "to device=": lambda x: x.to(device="cpu"),
    "copy_": lambda x: torch.empty(4).copy_(x),
    "tensor": lambda x: torch.tensor([x[0], 1.0]),
    "mask": lambda x: x[x > 1],
    "mask of the host": lambda x: x[torch.tensor([True, False, True, False])],
    "set mask": lambda x: x.__setitem__(x > 1, x[:2].clone()),
    "index_put": lambda x: x.index_put((x > 1,), x[0]),
    "masked_select": lambda x: x.masked_select(x > 1),
    "nonzero": lambda x: x.nonzero(),
    "argwhere": lambda x: torch.argwhere(x),
    "where": lambda x: torch.where(x > 1),
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "one_hot": lambda x: torch.nn.functional.one_hot(x.long(), 4),
    "backward": backward,
}
GOING_ON: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + torch.ones(4, device=DEVICE)).sum(),
    "index": lambda x: x[x.long()],
    "fill mask": lambda x: x.__setitem__(x > 1, 0.0),
    "fill mask, backward": lambda x: filled(x * torch.ones(4, device=DEVICE, requires_grad=True)).sum().backward(),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
    "where of three": lambda x: torch.where(x > 1, x, 0.0),
    "repeat_interleave of known size": lambda x: x.repeat_interleave(x.long(), output_size=6),
    "sent to the host": lambda x: x.to("cpu", non_blocking=True),
    "copy_ sent": lambda x: torch.empty(4).copy_(x, non_blocking=True),
    "of the host": lambda x: torch.tensor([1.0, 2.0])[torch.tensor([True, False])].nonzero().tolist(),
    "uploaded": lambda x: torch.ones(4).to(DEVICE, non_blocking=True) + x,
}


def waits_of(function: Callable[[Tensor], Any]) -> tuple[int, int]:
    """Reads and uploads."""
    values = torch.arange(4.0)
    with HostWaits() as waits:
        function(values)
    return waits.reads.total(), waits.uploads.total()


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_counted(name: str) -> None:
    num_reads, num_uploads = waits_of(WAITING[name])
    assert num_reads >= 1 and num_uploads == 0


@pytest.mark.parametrize("name", GOING_ON)
def test_what_does_not_wait_is_not_counted(name: str) -> None:
    assert waits_of(GOING_ON[name]) == (0, 0)


def test_uploads_that_wait_are_counted_and_then_on_the_device() -> None:
    assert waits_of(lambda x: torch.ones(4).to(DEVICE)) == (0, 1)
    assert waits_of(lambda x: torch.ones(4).to(DEVICE).tolist()) == (1, 1)
    assert waits_of(lambda x: torch.tensor([1.0], device=DEVICE)) == (0, 1)


def bf16(*degrees: int, **options: Any) -> ParallelConfig:
    return replace(fp32(*degrees, **options), precision=Precision.bf16)


LAYOUTS = {
    "one": (1, fp32()),
    "dp2": (2, fp32()),
    "dp2_zero2": (2, fp32(zero_stage=2)),
    "pp2": (2, fp32(1, 2)),
    "tp2": (2, fp32(2)),
    "one_bf16": (1, bf16()),
    "tp2_sp_bf16": (2, bf16(2, sequence_parallel=True)),
    "dp2_zero2_bf16": (2, bf16(zero_stage=2)),
    "megatron_dp2": (2, fp32(backend=Backend.megatron)),
}
PLACES = {Backend.deepspeed: "guards.py:_known", Backend.megatron: "clip_grads.py:get_grad_norm_fp32"}
"""Where the one look at the norm is."""


def waits_of_a_step(run_dir: Path, parallel: ParallelConfig, patch: Callable[[], None]) -> list[dict[str, int]]:
    """Reads and uploads of the last step, by place."""
    patch()
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    workload = TinyWorkload(STAGE3, parallel)
    engine: Any = build_engine(workload, tiny_recipe(run_dir, parallel, NUM_STEPS), groups)[0]
    if parallel.backend is Backend.deepspeed:
        for state in engine.optimizer.optimizer.state.values():
            state["step"].is_on_host = True
    for batches in workload.batches(groups.layout.dp_rank, groups.layout.dp_size, 0, NUM_STEPS):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        counts.is_on_host = True
        placed = [workload.place(batch, groups) for batch in batches]
        with HostWaits() as waits:
            engine.train_step(placed, counts, lr=1e-3)
    return [dict(waits.reads), dict(waits.uploads)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_waits_for_its_device_once(name: str, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[name]
    for found in results_of_ranks(waits_of_a_step, world_size, tmp_path, parallel, lambda: None):
        assert found == [{PLACES[parallel.backend]: 1}, {}]


def waits_of_a_run(run_dir: Path, parallel: ParallelConfig) -> list[dict[str, int]]:
    """Of four steps and two log intervals with what runs beside them, saving apart."""
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    recipe = tiny_recipe(run_dir, parallel, 4)
    recipe = replace(recipe, logging=replace(recipe.logging, log_every=2))
    train, waits = run_module.train, HostWaits()

    def watched(engine: Any, workload: Any, recipe: Any, groups: Any, hooks: Any, *rest: Any) -> int:
        for state in engine.optimizer.optimizer.state.values():
            state["step"].is_on_host = True
        saving = [hook for hook in hooks if isinstance(hook, CheckpointHook)]
        with waits:
            step = train(engine, workload, recipe, groups, [hook for hook in hooks if hook not in saving], *rest)
        for hook in saving:
            hook.at_end(step)
        return step

    run_module.train = watched
    run_module.run(TinyWorkload(STAGE3, parallel), recipe, groups)
    return [dict(waits.reads), dict(waits.uploads)]


@pytest.mark.parametrize(("world_size", "parallel"), [(1, fp32()), (2, fp32())], ids=["one", "dp2"])
def test_a_log_interval_waits_for_its_steps_alone(world_size: int, parallel: ParallelConfig, tmp_path: Path) -> None:
    for found in results_of_ranks(waits_of_a_run, world_size, tmp_path, parallel):
        assert found == [{"guards.py:_known": 4}, {}]


def test_trap_deepspeed_looks_at_the_norm_again(tmp_path: Path) -> None:
    def patch() -> None:
        known = ZeroGuard._known
        ZeroGuard._known = lambda self, norm: known(self, norm) * 0 + norm

    ((reads, _),) = results_of_ranks(waits_of_a_step, 1, tmp_path, fp32(), patch)
    assert sum(reads.values()) == 1 + 3
