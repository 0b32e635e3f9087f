"""Every layout trains as one process does: loss, gradient norm, gradients by name, weights."""

from pathlib import Path

import pytest

from janus_mega.config.schema import Backend, Module, Recompute
from tests.distributed.layout_runs import LayoutRun, compare, over_bar, run_layout
from tests.support.tiny import STAGE1, STAGE3, fp32

pytestmark = pytest.mark.dist

LAYOUTS = {
    "tp2": (2, fp32(2)),
    "tp2_sp": (2, fp32(2, sequence_parallel=True)),
    "pp2": (2, fp32(1, 2)),
    "dp2_zero1": (2, fp32()),
    "dp2_zero2": (2, fp32(zero_stage=2)),
    "dp2_zero3": (2, fp32(zero_stage=3)),
    "tp2_pp2_sp": (4, fp32(2, 2, sequence_parallel=True)),
    "dp2_rows2": (2, fp32(micro_batch_size=2)),
    "pp2_recompute_full": (2, fp32(1, 2, recompute=Recompute.full)),
    "tp2_recompute_selective": (2, fp32(2, recompute=Recompute.selective)),
    "pp2_interleaved": (2, fp32(1, 2, virtual_pp_size=2)),
    "pp2_uneven": (2, fp32(1, 2, pipeline_layers=[1, 3])),
    "tp2_pp2_sp_interleaved": (4, fp32(2, 2, sequence_parallel=True, virtual_pp_size=2)),
    "dp2_pp2_interleaved_recompute_full": (4, fp32(1, 2, virtual_pp_size=2, recompute=Recompute.full)),
    "megatron_one": (1, fp32(backend=Backend.megatron)),
    "megatron_dp2": (2, fp32(backend=Backend.megatron)),
    "megatron_tp2_sp": (2, fp32(2, sequence_parallel=True, backend=Backend.megatron)),
    "megatron_pp2": (2, fp32(1, 2, backend=Backend.megatron)),
    "megatron_pp2_interleaved": (2, fp32(1, 2, virtual_pp_size=2, backend=Backend.megatron)),
    "megatron_tp2_pp2_sp": (4, fp32(2, 2, sequence_parallel=True, backend=Backend.megatron)),
    "megatron_dp2_pp2_recompute_full": (4, fp32(1, 2, recompute=Recompute.full, backend=Backend.megatron)),
}
STAGES = {"stage1": STAGE1, "stage3": STAGE3}


@pytest.fixture(scope="module", params=STAGES)
def stage(request, tmp_path_factory) -> tuple[tuple[Module, ...], LayoutRun]:
    trainable = STAGES[request.param]
    return trainable, run_layout(tmp_path_factory.mktemp("one"), 1, fp32(), trainable)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(
    name: str, stage: tuple[tuple[Module, ...], LayoutRun], tmp_path: Path, record_property
) -> None:
    trainable, one = stage
    world_size, parallel = LAYOUTS[name]
    run = run_layout(tmp_path, world_size, parallel, trainable)
    figures = compare(run, one)
    for key, value in figures.items():
        record_property(key, value)
    assert over_bar(figures) <= 1, figures


def test_frozen_modules_do_not_move(stage: tuple[tuple[Module, ...], LayoutRun]) -> None:
    trainable, one = stage
    trained = {name.split("/", 1)[1] for name in one.gradients}
    prefixes = {"decoder" if module == Module.backbone else module.value for module in trainable}
    assert {name.split(".", 1)[0] for name in trained} == prefixes
    assert trained | set(one.weights) == set(one.weights)
