"""Images dealt over tp ranks are encoded as one process encodes them; fewer than ranks, or none, included.

That the sum of the encoder's gradients is needed, and the layouts it composes with, are in test_traps and test_layouts.
"""

from dataclasses import replace

import pytest

from janus_mega.config.load import load_config
from janus_mega.config.schema import ParallelConfig, RunConfig
from janus_mega.config.validate import run_problems
from janus_mega.parallel.layout import share_of
from tests.distributed.layout_runs import Variant, assert_options_acted, compare, over_bar, run_layout
from tests.support.tiny import STAGE1, STAGE3, fp32, tiny_model

pytestmark = pytest.mark.dist


def four_heads():
    model = tiny_model()
    return replace(model, backbone=replace(model.backbone, num_kv_heads=4))


@pytest.mark.parametrize(
    ("world_size", "parallel", "trainable"),
    [
        (4, fp32(4, split_encoder=True, micro_batch_size=2), STAGE3),  # of no image to five
        (2, fp32(2, split_encoder=True, encode_ahead=3, micro_batch_size=2), STAGE1),
    ],
    ids=["tp4", "tp2_encode_ahead"],
)
def test_dealt_images_leave_training_alone(
    world_size: int, parallel: ParallelConfig, trainable, tmp_path, record_property
) -> None:
    variant = Variant(model=four_heads(), optimizer={"eps": 1e-6})  # weights then follow gradients, not their rounding
    one = run_layout(tmp_path, 1, fp32(), trainable, variant)
    run = run_layout(tmp_path, world_size, parallel, trainable, variant)
    assert_options_acted(run, parallel)
    figures = compare(run, one)
    for key, value in figures.items():
        record_property(key, value)
    assert over_bar(figures) <= 1, figures


@pytest.mark.parametrize("num_items", range(10))
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_item_has_one_rank(num_items: int, num_ranks: int) -> None:
    shares = [share_of(num_items, num_ranks, rank) for rank in range(num_ranks)]
    assert [item for share, _ in shares for item in share] == list(range(num_items))
    assert {size for _, size in shares} == {-(-num_items // num_ranks)}
    assert all(len(share) <= size for share, size in shares)


def test_nobody_to_deal_to_is_refused() -> None:
    config = load_config(RunConfig, "run/janus_pro_1b_stage3.yaml", ["parallel.split_encoder=true"]).config
    assert any("parallel.split_encoder" in problem for problem in run_problems(config, 1))
