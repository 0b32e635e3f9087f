"""The moving average of the weights is what a plain loop over whole weights gives, whatever cuts it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.reader import EMA_PREFIX
from janus_mega.checkpoint.trained import open_trained
from janus_mega.config.schema import Backend, ParallelConfig
from janus_mega.train.health import Health
from tests.distributed.layout_runs import BARS, difference
from tests.distributed.resume_runs import Case, saved, undisturbed
from tests.support.tiny import STAGE1, fp32

pytestmark = pytest.mark.dist

DECAY = 0.7
STEPS = (1, 2, 3, 4)
LAYOUTS = {
    "one": (1, fp32()),
    "dp2_zero1_bf16": (2, ParallelConfig()),
    "dp2_zero2": (2, fp32(zero_stage=2)),
    "dp2_zero3_bf16": (2, ParallelConfig(zero_stage=3)),
    "tp2_pp2_interleaved": (4, fp32(2, 2, sequence_parallel=True, virtual_pp_size=2)),
    "megatron_dp2_bf16": (2, ParallelConfig(backend=Backend.megatron)),
}


def weights_at(run_dir: Path, step: int) -> dict[str, Tensor]:
    reader = saved(run_dir, step)
    return {name: reader.read(name) for name in reader.weight_names}


def averages_at(run_dir: Path, step: int) -> dict[str, Tensor]:
    reader = saved(run_dir, step)
    return {name.removeprefix(EMA_PREFIX): reader.read(name) for name in reader.names if name.startswith(EMA_PREFIX)}


def plain_average(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The formula in fp64 over whole weights, the first of which is where training began."""
    average = {name: weight.double() for name, weight in states[0].items()}
    for weights in states[1:]:
        average = {name: DECAY * old + (1 - DECAY) * weights[name].double() for name, old in average.items()}
    return {name: value.float() for name, value in average.items()}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step: weights to begin with that a checkpoint holds."""
    return undisturbed(tmp_path_factory.mktemp("start"), Case(1, fp32(), last_step=1), 1)


@pytest.fixture(scope="module")
def one(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("one"), case_of(start, *LAYOUTS["one"]), 1)


def case_of(start: Path, world_size: int, parallel: ParallelConfig) -> Case:
    return Case(world_size, parallel, ema=DECAY, init_from=str(start / "checkpoints/step-00000001"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_average_is_that_of_a_plain_loop(layout: str, start: Path, one: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    run_dir = one if layout == "one" else undisturbed(tmp_path, case_of(start, world_size, parallel), 1)
    states = [weights_at(start, 1), *(weights_at(run_dir, step) for step in STEPS)]
    for step in STEPS:
        expected, found = plain_average(states[: step + 1]), averages_at(run_dir, step)
        assert found.keys() == expected.keys()
        assert difference(found, expected) <= 3e-7
    assert difference(averages_at(run_dir, 4), weights_at(run_dir, 4)) > 1e-4  # it is an average, not the weights
    if parallel.precision is fp32().precision:
        assert difference(averages_at(run_dir, 4), averages_at(one, 4)) <= BARS["weights"]


def refusing(*steps: int) -> Callable[[], None]:
    """Leaves out the updates of these steps, as if they were spikes."""

    def patch() -> None:
        judge, seen = Health.judge, []

        def refuse(self: Health, values: dict[str, float]) -> str:
            seen.append(len(seen) + 1)
            return "refused by the test" if seen[-1] in steps else judge(self, values)

        Health.judge = refuse

    return patch


def test_a_skipped_step_is_not_averaged(start: Path, tmp_path: Path) -> None:
    case = case_of(start, 2, fp32(zero_stage=2))
    run_dir = undisturbed(tmp_path, replace(case, patch=refusing(2)), 1)
    states = {step: weights_at(run_dir, step) for step in STEPS}
    assert difference(states[1], states[2]) == 0
    assert difference(averages_at(run_dir, 1), averages_at(run_dir, 2)) == 0
    updates = plain_average([weights_at(start, 1), states[1], states[3], states[4]])
    assert difference(averages_at(run_dir, 4), updates) <= 3e-7


@pytest.mark.parametrize("backend", Backend)
def test_going_back_takes_the_average_along(backend: Backend, start: Path, tmp_path: Path) -> None:
    case = case_of(start, 2, ParallelConfig(backend=backend))
    run_dir = undisturbed(tmp_path, replace(case, max_skips=2, patch=refusing(3, 4)), 1)
    assert saved(run_dir, 4).read_state().health["rewinds"] == [[1, 4]]
    then, now = averages_at(run_dir, 1), averages_at(run_dir, 4)
    assert [name for name in then if not torch.equal(then[name], now[name])] == []
    assert difference(averages_at(run_dir, 2), now) > 0


def test_frozen_parameters_have_no_average(tmp_path: Path) -> None:
    run_dir = undisturbed(tmp_path, Case(1, fp32(), ema=DECAY, trainable=STAGE1, last_step=1), 1)
    averaged, weights = averages_at(run_dir, 1), weights_at(run_dir, 1)
    assert averaged and {name.split(".")[0] for name in averaged} == {module.value for module in STAGE1}
    trained = open_trained(run_dir / "checkpoints/step-00000001", averaged=True)
    for name, weight in weights.items():
        vocabulary = name in ("text_embedding.weight", "text_head.weight")
        assert torch.equal(trained.read(name), averaged.get(name, weight)) or vocabulary, name


def test_an_average_that_is_not_there_is_refused(start: Path) -> None:
    with pytest.raises(UserError, match="holds no average of the weights; train with optimizer.ema_decay"):
        open_trained(start / "checkpoints/step-00000001", averaged=True)
