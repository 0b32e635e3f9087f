"""A step waits for its device once: for the norm, which decides about the update; see tests/support/host_waits.py."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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


def bf16(*degrees: int, **options: Any) -> ParallelConfig:
    return replace(fp32(*degrees, **options), precision=Precision.bf16)


LAYOUTS = {
    "one": (1, fp32()),
    "dp2": (2, fp32()),
    "dp2_zero2": (2, fp32(zero_stage=2)),
    "pp2": (2, fp32(1, 2)),
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
