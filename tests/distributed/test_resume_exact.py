"""Stopped after some step and gone on with, a run is the run that nothing disturbed: bit for bit, step for step.

`JANUS_LAYOUTS=all` runs every case; without it, those that between them have every degree, ZeRO stage and backend, and
a few more that `JANUS_LAYOUT_SEED` picks, by default the commit.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from janus_mega.checkpoint.reader import CheckpointReader
from janus_mega.config.schema import Backend, OptimizerState, ParallelConfig, Precision, Recompute
from janus_mega.parallel.generators import generator_states, restore_generators
from janus_mega.train import restoring
from tests.distributed.resume_runs import STEPS, Case, difference_of, resumed, saved, told, undisturbed
from tests.support.picked import layout_seed, picked_beside, skip_unless_taken
from tests.support.shards import TinyShards, make_shards
from tests.support.tiny import STAGE1, fp32

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

MEGATRON, FULL, SELECTIVE = Backend.megatron, Recompute.full, Recompute.selective
EMA = 0.7


def bf16(tp_size: int = 1, pp_size: int = 1, **options) -> ParallelConfig:
    return replace(fp32(tp_size, pp_size, **options), precision=Precision.bf16)


CASES = {
    "one": Case(1, fp32(), draws=True, ema=EMA),
    "dp2_zero1": Case(2, fp32(), draws=True),
    "dp2_zero1_bf16_ema": Case(2, bf16(), ema=EMA),
    "dp2_zero2": Case(2, fp32(zero_stage=2), draws=True),
    "dp2_zero2_bf16_ema": Case(2, bf16(zero_stage=2), ema=EMA, draws=True),
    "dp2_zero3_ema": Case(2, fp32(zero_stage=3), ema=EMA, draws=True),
    "dp2_zero3_bf16_recompute": Case(2, bf16(zero_stage=3, recompute=FULL), draws=True),
    "tp2_sp": Case(2, fp32(2, sequence_parallel=True), draws=True),
    "tp2_bf16_recompute_ema": Case(2, bf16(2, recompute=SELECTIVE), ema=EMA, draws=True),
    "pp2": Case(2, fp32(1, 2), draws=True),
    "pp2_interleaved_ema": Case(2, fp32(1, 2, virtual_pp_size=2), ema=EMA, draws=True),
    "pp2_bf16_recompute": Case(2, bf16(1, 2, recompute=FULL), draws=True),
    "tp2_pp2": Case(4, fp32(2, 2), draws=True),
    "tp2_pp2_interleaved_sp_bf16_ema": Case(
        4, bf16(2, 2, sequence_parallel=True, virtual_pp_size=2), ema=EMA, draws=True
    ),
    "tp2_dp2_zero2": Case(4, fp32(2, sequence_parallel=True, zero_stage=2), draws=True),
    "megatron_dp2": Case(2, fp32(backend=MEGATRON), draws=True),
    "megatron_dp2_bf16_ema": Case(2, bf16(backend=MEGATRON), ema=EMA, draws=True),
    "megatron_tp2_pp2_interleaved": Case(
        4, fp32(2, 2, sequence_parallel=True, virtual_pp_size=2, backend=MEGATRON), draws=True
    ),
    "rows_dp2_zero1": Case(2, fp32(), ema=EMA),
    "rows_megatron_pp2": Case(2, fp32(1, 2, backend=MEGATRON)),
}
REPRESENTATIVE = {
    "one",
    "dp2_zero2_bf16_ema",
    "dp2_zero3_ema",
    "tp2_bf16_recompute_ema",
    "tp2_pp2_interleaved_sp_bf16_ema",
    "megatron_dp2_bf16_ema",
    "rows_dp2_zero1",
}
AFTER_ONE_STEP = {
    "one",
    "dp2_zero2_bf16_ema",
    "tp2_pp2_interleaved_sp_bf16_ema",
    "megatron_dp2_bf16_ema",
    "rows_dp2_zero1",
    "pp2",
}
"""Cases that stop after the very first step; the others stop anywhere."""
TAKEN = REPRESENTATIVE | picked_beside(REPRESENTATIVE, CASES, layout_seed())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TinyShards:
    return make_shards(tmp_path_factory.mktemp("shards"))


def assert_same(found: Path, expected: Path, stop: int) -> None:
    """All that the rest of the run logged, and every tensor and count it saved."""
    assert told(found) == told(expected, after=stop)
    assert len(told(found)) == STEPS - stop and all("batch_hash" in values for values in told(found).values())
    comparison = difference_of(found, expected)
    assert comparison.are_equal, comparison


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bitwise_in_the_same_layout(
    name: str, shards: TinyShards, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    skip_unless_taken(name, TAKEN)
    case = replace(CASES[name], shards=shards) if name.startswith("rows") else CASES[name]
    stop = 1 if name in AFTER_ONE_STEP else random.Random(name).randrange(1, STEPS)
    record_property("stop", stop)
    expected = undisturbed(tmp_path / "whole", case, stop)
    assert_same(resumed(tmp_path / "rest", expected, stop, case), expected, stop)


FORGETTING = fp32(1, 2)
GENERATORS = ("torch", "python", "numpy", "megatron.data-parallel-rng")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose ranks differ in dp and pp."""
    return undisturbed(tmp_path_factory.mktemp("drawn"), Case(4, FORGETTING, draws=True), 1)


def keep_all(name: str, states: dict[str, Tensor]) -> None:
    restore_generators(states)


def forget_one(name: str, states: dict[str, Tensor]) -> None:
    restore_generators(states | {name: generator_states()[name]})


def forget_what_waits(name: str, states: dict[str, Tensor]) -> None:
    """A draw takes the waiting number and leaves the generator else where it is."""
    restore_generators(states)
    if name == "torch":
        torch.randn(())
    elif name == "python":
        random.gauss(0, 1)
    elif name == "numpy":
        np.random.normal()  # noqa: NPY002
    else:
        with get_cuda_rng_tracker().fork(name.removeprefix("megatron.")):
            torch.randn(())


@pytest.mark.parametrize(
    ("restore", "name", "rank"),
    [
        (keep_all, "", 0),
        *((restore, name, 0) for restore in (forget_one, forget_what_waits) for name in GENERATORS),
        *((forget_one, "torch", rank) for rank in (1, 2, 3)),
    ],
)
def test_what_a_generator_forgets_is_seen_in_every_step(
    restore: Callable[[str, dict[str, Tensor]], None], name: str, rank: int, drawn: Path, tmp_path: Path
) -> None:
    """The guard of this file can fail: on one rank one generator, or the number that waits in it, is not put back."""

    def patch() -> None:
        if dist.get_rank() == rank:
            restoring.restore_generators = partial(restore, name)

    case = Case(4, FORGETTING, draws=True, patch=patch)
    found, expected = told(resumed(tmp_path, drawn, 1, case)), told(drawn, after=1)
    is_same = [found[step]["loss"] == expected[step]["loss"] for step in sorted(expected)]
    assert is_same == [restore is keep_all] * (STEPS - 1)


def test_each_rank_has_states_of_its_own(drawn: Path, tmp_path: Path) -> None:
    """So the states of another rank would be wrong ones, and are seen to be."""
    reader = saved(drawn, 1)
    states = [reader.read_state(rank).rng for rank in range(4)]
    for name in (*GENERATORS, "megatron.model-parallel-rng"):
        assert len({tuple(state[name].tolist()) for state in states}) == 4, name

    def patch() -> None:
        read = CheckpointReader.read_state
        CheckpointReader.read_state = lambda self, rank=0: replace(read(self, rank), rng=read(self, 0).rng)

    case = Case(4, FORGETTING, draws=True, patch=patch)
    assert told(resumed(tmp_path, drawn, 1, case))[2]["loss"] != told(drawn)[2]["loss"]


def test_cases_hold_what_they_promise() -> None:
    assert len(CASES) == 20 and set(CASES) >= REPRESENTATIVE | AFTER_ONE_STEP
    seen = [picked_beside(REPRESENTATIVE, CASES, seed) for seed in range(60)]
    assert all(len(picked) == 2 for picked in seen) and set.union(*seen) == set(CASES) - REPRESENTATIVE
    for cases in (CASES.values(), [CASES[name] for name in REPRESENTATIVE]):
        layouts = [case.parallel for case in cases]
        assert {2, 3} <= {layout.zero_stage for layout in layouts}
        assert {Backend.megatron, Backend.deepspeed} == {layout.backend for layout in layouts}
        assert any(layout.tp_size > 1 and layout.pp_size > 1 and layout.virtual_pp_size > 1 for layout in layouts)
        assert any(case.ema and case.parallel.precision is Precision.bf16 for case in cases)


@pytest.mark.parametrize("policy", OptimizerState)
def test_resume_is_bitwise_behind_a_stage_border(policy: OptimizerState, tmp_path: Path) -> None:
    """The first stage trains few modules, the second all: after a stop inside it, it goes on from itself."""
    first = Case(1, fp32(), ema=EMA, trainable=STAGE1, last_step=2)
    border = undisturbed(tmp_path / "first", first, 2) / "checkpoints" / "step-00000002"
    second = Case(2, fp32(), ema=EMA, draws=True, init_from=str(border), optimizer_state=policy)
    expected = undisturbed(tmp_path / "second", second, 1)
    assert_same(resumed(tmp_path / "rest", expected, 1, second), expected, 1)
