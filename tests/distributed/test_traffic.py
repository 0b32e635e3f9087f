"""The closed formulas of `estimate.traffic` are what a step really sends, per group and kind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.schema import TokenKind
from janus_mega.config.schema import (
    Backend,
    LossConfig,
    ModelConfig,
    Module,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    Recompute,
    RunConfig,
    StageConfig,
)
from janus_mega.estimate.batch import MicroBatch
from janus_mega.estimate.shape import rank_shapes
from janus_mega.estimate.traffic import step_traffic
from janus_mega.parallel.groups import build_groups
from janus_mega.train.run import build_engine
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import STAGE1, STAGE3, TinyWorkload, fp32, tiny_model, tiny_recipe
from tests.support.traffic import CountedTraffic

pytestmark = pytest.mark.dist
import_what_ranks_need()

BAR = 0.01
MEGATRON = {"backend": Backend.megatron}
FULL = {"recompute": Recompute.full}


def bf16(tp_size: int = 1, **options) -> ParallelConfig:
    return replace(fp32(tp_size, **options), precision=Precision.bf16)


OFTEN = {
    "tp2": (2, fp32(2), STAGE3),
    "tp2_stage1": (2, fp32(2), STAGE1),
    "tp2_sp_full": (2, fp32(2, sequence_parallel=True, **FULL), STAGE3),
    "tp2_bf16": (2, bf16(2), STAGE3),
    "pp2": (2, fp32(1, 2), STAGE3),
    "pp2_interleaved": (2, fp32(1, 2, virtual_pp_size=2), STAGE1),
    "dp2_zero1": (2, fp32(), STAGE3),
    "dp2_zero2_rows2": (2, fp32(zero_stage=2, micro_batch_size=2), STAGE3),
    "dp2_zero3": (2, fp32(zero_stage=3), STAGE3),
    "megatron_dp2": (2, fp32(**MEGATRON), STAGE3),
    "megatron_tp2_sp": (2, fp32(2, sequence_parallel=True, **MEGATRON), STAGE3),
}
SELDOM = {
    "tp2_full": (2, fp32(2, **FULL), STAGE3),
    "tp2_sp": (2, fp32(2, sequence_parallel=True), STAGE3),
    "tp2_split_encoder": (2, fp32(2, split_encoder=True, micro_batch_size=2), STAGE3),
    "tp2_split_encoder_stage1": (2, fp32(2, split_encoder=True), STAGE1),
    "dp2_bf16": (2, bf16(), STAGE3),
    "dp2_zero2_bf16": (2, bf16(zero_stage=2), STAGE3),
    "tp2_bf16_stage1": (2, bf16(2), STAGE1),
    "tp2_bf16_rounded": (2, bf16(2, tp_sums_in_fp32=False), STAGE3),
    "tp2_sp_bf16_full": (2, bf16(2, sequence_parallel=True, **FULL), STAGE3),
    "tp2_sp_bf16_stage1": (2, bf16(2, sequence_parallel=True), STAGE1),
    "megatron_tp2_bf16": (2, bf16(2, **MEGATRON), STAGE3),
    "tp2_sp_stage1": (2, fp32(2, sequence_parallel=True), STAGE1),
    "tp2_pp2_sp": (4, fp32(2, 2, sequence_parallel=True), STAGE3),
    "tp2_selective": (2, fp32(2, recompute=Recompute.selective), STAGE3),
    "dp2_zero3_stage1": (2, fp32(zero_stage=3), STAGE1),
    "dp2_pp2_interleaved_full": (4, fp32(1, 2, virtual_pp_size=2, **FULL), STAGE3),
    "dp2_tp2_zero2": (4, fp32(2, zero_stage=2), STAGE3),
    "megatron_tp2_pp2_sp": (4, fp32(2, 2, sequence_parallel=True, **MEGATRON), STAGE1),
    "megatron_dp2_pp2_full": (4, fp32(1, 2, **FULL, **MEGATRON), STAGE3),
}
CASES = [
    *(pytest.param(*case, id=name) for name, case in OFTEN.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.seldom) for name, case in SELDOM.items()),
]


def wide_model() -> ModelConfig:
    """The tiny model with matrices that ZeRO-3 does not keep gathered."""
    model = tiny_model()
    backbone = replace(model.backbone, hidden_size=512, num_heads=8, num_kv_heads=8, ffn_hidden_size=1024)
    return replace(model, backbone=backbone)


def config_of(parallel: ParallelConfig, trainable: tuple[Module, ...], model: ModelConfig | None = None) -> RunConfig:
    return RunConfig(
        name="tiny",
        run_dir="",
        model=model or tiny_model(),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3),
        stage=StageConfig(name="s", trainable=list(trainable), num_steps=1, global_batch_size=8),
        loss=LossConfig(),
    )


def counts_of(batch) -> MicroBatch:
    """What the formulas want to know of a Batch."""
    is_scored = batch["label_head"] != 0
    labels = torch.bincount(batch["label_task"][is_scored].flatten().long(), minlength=3).tolist()
    drawn = int((batch["token_kind"] == TokenKind.image_gen).sum())
    return MicroBatch(batch["token_kind"].numel(), tuple(labels), batch["pixel_values"].shape[0], drawn)


def counted_and_told(
    tmp_path: Path, parallel: ParallelConfig, trainable: tuple[Module, ...], model: ModelConfig | None = None
):
    """Of the second step (the first is a warm-up): what operators carried, what formulas say."""
    groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
    workload = TinyWorkload(trainable, parallel, model)
    engine, _ = build_engine(workload, tiny_recipe(tmp_path, parallel, 2), groups)
    layout = groups.layout
    for batches in workload.batches(layout.dp_rank, layout.dp_size, 0, 2):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        placed = [workload.place(batch, groups) for batch in batches]
        counted = CountedTraffic(groups)
        with counted:
            engine.train_step(placed, counts, lr=1e-3)
    config = config_of(parallel, trainable, model)
    shape = rank_shapes(config)[layout.pp_rank]
    told = step_traffic(config, layout.world_size, shape, [counts_of(batch) for batch in batches])
    return [
        {" ".join(key): [found.calls[key], found.bytes[key]] for key in sorted(found.calls)}
        for found in (counted, told)
    ]


@pytest.mark.parametrize(("world_size", "parallel", "trainable"), CASES)
def test_a_step_sends_what_the_formulas_say(world_size, parallel, trainable, tmp_path):
    for counted, told in results_of_ranks(counted_and_told, world_size, tmp_path, parallel, trainable):
        assert counted.keys() == told.keys()
        for key, (calls, size) in counted.items():
            assert told[key][0] == pytest.approx(calls, rel=BAR), key
            assert told[key][1] == pytest.approx(size, rel=BAR), key


def test_zero_3_gathers_large_weights_once_per_micro_batch(tmp_path):
    parallel = fp32(zero_stage=3, micro_batch_size=2)
    for counted, told in results_of_ranks(counted_and_told, 2, tmp_path, parallel, STAGE3, wide_model()):
        assert told == {key: pytest.approx(value, rel=BAR) for key, value in counted.items()}
