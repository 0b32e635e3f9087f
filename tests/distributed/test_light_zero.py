"""What is taken out of DeepSpeed's ZeRO-1 for speed changes no bit of what it trains."""

from pathlib import Path

import pytest
import torch

from janus_mega.config.schema import ParallelConfig
from janus_mega.engine import deepspeed_backend
from tests.distributed.layout_runs import Variant, run_layout
from tests.support.tiny import STAGE1, STAGE3, fp32

pytestmark = pytest.mark.dist

CASES = {
    "one": (1, fp32(), STAGE3),
    "dp2": (2, fp32(), STAGE3),
    "dp2_zero2": (2, fp32(zero_stage=2), STAGE3),
    "pp2_stage1": pytest.param(2, fp32(1, 2), STAGE1, marks=pytest.mark.seldom),
    "tp2_dp2_sp": pytest.param(4, fp32(2, sequence_parallel=True), STAGE3, marks=pytest.mark.seldom),
    "dp4": pytest.param(4, fp32(), STAGE3, marks=pytest.mark.seldom),
}


def with_deepspeeds_own() -> None:
    plain = deepspeed_backend.deepspeed_config

    def heavy(*args):
        config = plain(*args)
        config["zero_optimization"].pop("reduce_scatter", None)
        config.pop("prescale_gradients", None)
        return config

    deepspeed_backend.deepspeed_config = heavy
    deepspeed_backend.lighten = lambda zero: None


@pytest.mark.parametrize(("world_size", "parallel", "trainable"), CASES.values(), ids=CASES)
def test_light_zero_is_zero_bit_for_bit(world_size: int, parallel: ParallelConfig, trainable, tmp_path: Path) -> None:
    light, heavy = (
        run_layout(tmp_path, world_size, parallel, trainable, Variant(patch=patch))
        for patch in (None, with_deepspeeds_own)
    )
    assert (light.losses, light.grad_norms) == (heavy.losses, heavy.grad_norms)
    for found, expected in ((light.gradients, heavy.gradients), (light.weights, heavy.weights)):
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
