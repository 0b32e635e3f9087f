"""A stage may go on with the optimizer of the one before it: exactly, for what trained there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from janus_mega.checkpoint.reader import EMA_PREFIX, OPTIMIZER_PREFIX, CheckpointReader
from janus_mega.config.schema import Backend, OptimizerState, ParallelConfig
from tests.distributed.layout_runs import KEY_BIAS
from tests.distributed.resume_runs import Case, saved, undisturbed
from tests.support.tiny import STAGE1, STAGE3, TinyWorkload, fp32

pytestmark = pytest.mark.dist

PERIOD = 2
LAYOUTS = {
    "one": (1, fp32()),
    "dp2_zero3_bf16": (2, ParallelConfig(zero_stage=3)),
    "megatron_tp2": (2, fp32(2, backend=Backend.megatron)),
}


def repeat_the_data() -> None:
    """A stage that begins at its step 0 then sees what going on would have seen."""
    batches = TinyWorkload.batches

    def repeated(self: TinyWorkload, dp_rank: int, dp_size: int, first: int, last: int) -> Iterator[list]:
        for step in range(first, last):
            yield from batches(self, dp_rank, dp_size, step % PERIOD, step % PERIOD + 1)

    TinyWorkload.batches = repeated


def tensors_of(reader: CheckpointReader) -> dict[str, Tensor]:
    return {name: reader.read(name) for name in reader.names if not name.startswith("rng/")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", OptimizerState)
def test_carrying_into_the_same_stage_is_going_on(layout: str, policy: OptimizerState, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    whole = Case(world_size, parallel, ema=0.7, patch=repeat_the_data, one_rate=True, last_step=2 * PERIOD)
    expected = tensors_of(saved(undisturbed(tmp_path / "whole", whole, PERIOD), 2 * PERIOD))
    border = tmp_path / "whole" / "checkpoints" / f"step-{PERIOD:08d}"
    second = Case(
        world_size,
        parallel,
        ema=0.7,
        patch=repeat_the_data,
        one_rate=True,
        init_from=str(border),
        optimizer_state=policy,
        last_step=PERIOD,
    )
    reader = saved(undisturbed(tmp_path / "second", second, PERIOD), PERIOD)
    found = tensors_of(reader)
    assert found.keys() == expected.keys()
    different = {name for name in expected if not torch.equal(found[name], expected[name])}
    if policy is OptimizerState.carry:
        assert different == set()
        assert reader.read_state().health["updates"] == 2 * PERIOD
    else:  # the test can fail
        assert len(different) > len(expected) / 2
        assert reader.read_state().health["updates"] == PERIOD


def test_what_did_not_train_before_begins_at_zero(tmp_path: Path) -> None:
    first = undisturbed(tmp_path / "first", Case(1, fp32(), ema=0.7, trainable=STAGE1, last_step=2), 2)
    border = first / "checkpoints" / "step-00000002"
    case = Case(
        2, fp32(), ema=0.7, trainable=STAGE3, last_step=1, init_from=str(border), optimizer_state=OptimizerState.carry
    )
    before, after = saved(first, 2), saved(undisturbed(tmp_path / "second", case, 1), 1)
    assert after.read_state().health["updates"] == 3
    carried = [name for name in before.names if name.startswith(f"{OPTIMIZER_PREFIX}exp_avg_sq/")]
    new = [name for name in after.names if name.startswith(f"{OPTIMIZER_PREFIX}exp_avg_sq/") and name not in carried]
    assert carried and new
    for name in carried:
        assert (after.read(name) >= 0.95 * before.read(name) - 1e-12).all()
    lr = 1e-3 / 2  # the first step of the warm-up
    for name in new:
        parameter = name.split("/", 1)[1]
        if parameter.endswith(KEY_BIAS):
            continue  # its gradient is rounding alone, and may be smaller than AdamW's epsilon
        weight, moved = before.read(parameter), after.read(parameter)
        # AdamW corrects by the carried count, 3: less than for moments that began at zero, whose first step is 1 rate.
        corrected = (0.1 / (1 - 0.9**3)) / (0.05 / (1 - 0.95**3)) ** 0.5
        step = (moved - weight).abs() - 0.1 * lr * weight.abs()
        assert 0.5 * corrected * lr < step.max() <= 1.01 * corrected * lr < 0.7 * lr
        averaged = after.read(EMA_PREFIX + parameter)
        torch.testing.assert_close(averaged, 0.7 * weight + 0.3 * moved, rtol=0, atol=5e-7)


def test_weights_without_moments_are_refused(tmp_path: Path) -> None:
    first = undisturbed(tmp_path / "first", Case(1, fp32(), last_step=1), 1)

    def without_moments() -> None:
        names = CheckpointReader.names.fget
        kept = property(lambda reader: [name for name in names(reader) if not name.startswith(OPTIMIZER_PREFIX)])
        CheckpointReader.names = kept

    border = str(first / "checkpoints" / "step-00000001")
    case = Case(1, fp32(), init_from=border, optimizer_state=OptimizerState.carry, patch=without_moments)
    with pytest.raises(ProcessRaisedException, match="holds no optimizer state to carry; set stage.optimizer_state"):
        undisturbed(tmp_path / "second", case, 1)
