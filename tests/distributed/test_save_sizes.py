"""What `estimate` tells of saves is what engines hand to them: bytes of a checkpoint, and of the copy on a rank."""

from dataclasses import replace
from pathlib import Path

import pytest

from janus_mega.checkpoint.staging import Staging
from janus_mega.config.schema import Backend, CheckpointConfig, Module, ParallelConfig
from janus_mega.engine.ema import MovingAverage
from janus_mega.engine.state import moment_slices, weight_slices
from janus_mega.estimate.saves import save_sizes
from janus_mega.estimate.shape import rank_shapes
from janus_mega.parallel.groups import build_groups
from janus_mega.train.run import build_engine
from tests.distributed.test_traffic import bf16, config_of
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import STAGE1, STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist
import_what_ranks_need()

BAR = 0.05
"""Optimizers pad what they cut, so a rank's share is not exactly one over dp."""
EMA = 0.5
LAYOUTS: dict[str, tuple[int, ParallelConfig, tuple[Module, ...]]] = {
    "one_bf16_stage1": (1, bf16(), STAGE1),
    "tp2": (2, fp32(2), STAGE3),
    "pp2_stage1": (2, fp32(1, 2), STAGE1),
    "dp2_zero2": (2, fp32(zero_stage=2), STAGE3),
    "dp2_zero3_stage1": (2, fp32(zero_stage=3), STAGE1),
    "megatron_dp2_bf16_stage1": (2, bf16(backend=Backend.megatron), STAGE1),
}


def copied(tmp_path: Path, parallel: ParallelConfig, trainable: tuple[Module, ...]) -> tuple[int, int]:
    """Bytes of the pieces that this rank writes, and of the memory that their copy takes."""
    groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
    workload = TinyWorkload(trainable, parallel)
    engine, shards = build_engine(workload, tiny_recipe(tmp_path, parallel, 1, ema_decay=EMA), groups)
    engine.create_moments(1)
    averages = MovingAverage(engine, shards, EMA).owned()
    slices = [*weight_slices(engine, shards), *moment_slices(engine, shards), *averages]
    staging = Staging()
    staging.snapshot(slices)
    return sum(piece.tensor.nbytes for piece in slices), staging.num_bytes


@pytest.mark.parametrize("name", LAYOUTS)
def test_saves_take_what_the_estimate_says(name: str, tmp_path: Path) -> None:
    world_size, parallel, trainable = LAYOUTS[name]
    ranks = results_of_ranks(copied, world_size, tmp_path, parallel, trainable)
    config = config_of(parallel, trainable)
    config = replace(config, checkpoint=CheckpointConfig(save_every=1, keep_last=3))
    config = replace(config, optimizer=replace(config.optimizer, ema_decay=EMA))
    told = save_sizes(config, world_size, rank_shapes(config))
    assert told.checkpoint == sum(written for written, _ in ranks)
    assert told.disk == 4 * told.checkpoint
    assert told.staging == pytest.approx(max(copy for _, copy in ranks), rel=BAR)
    assert told.node_staging >= (1 - BAR) * sum(copy for _, copy in ranks)


def test_nothing_is_copied_where_saves_are_waited_for() -> None:
    config = config_of(fp32(), STAGE3)
    shapes = rank_shapes(config)
    for waiting in (CheckpointConfig(), CheckpointConfig(save_every=1, asynchronous=False)):
        told = save_sizes(replace(config, checkpoint=waiting), 1, shapes)
        assert told.checkpoint > 0 and told.staging == told.node_staging == 0


def test_the_copy_is_bounded_as_configured() -> None:
    config = config_of(fp32(), STAGE3)
    bounded = CheckpointConfig(save_every=1, staging_gib=1e-5)
    told = save_sizes(replace(config, checkpoint=bounded), 4, rank_shapes(config))
    assert told.staging == int(1e-5 * 2**30) and told.node_staging == 4 * told.staging
