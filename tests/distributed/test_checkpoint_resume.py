"""What a start refuses, what it leaves alone, and that tests of resume would see a start that forgets something.

That a resume is exact is in test_resume_exact.py and test_resume_elsewhere.py. Runs go through `train.run`, each leg in
new processes, with a learning rate that changes every step.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from data_pipeline.errors import UserError
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.config.schema import BackboneConfig, Module, ParallelConfig, Schedule
from janus_mega.parallel.groups import build_groups
from janus_mega.parallel.slices import Slice
from janus_mega.train import restoring
from janus_mega.train import run as run_module
from janus_mega.train.order import FixedOrder
from tests.distributed.layout_runs import BARS, difference
from tests.support.ranks import results_of_ranks
from tests.support.tiny import STAGE1, STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist

STEPS = 4
HALF = 2
BAR = BARS["weights"]  # measured worst 2e-6
FACTOR = 5


def train_leg(
    run_dir: Path, parallel: ParallelConfig, last_step: int, trainable: tuple[Module, ...], options: dict[str, Any]
) -> str:
    """One process start of a run; the path of its last checkpoint."""
    if "patch" in options:
        options["patch"]()
    groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
    workload = TinyWorkload(trainable, parallel)
    workload.order = FixedOrder(options.get("plan_digest", "tiny"))
    recipe = tiny_recipe(run_dir, parallel, last_step, schedule=Schedule.cosine, warmup_steps=2)
    recipe = replace(recipe, num_steps=STEPS, init_from=options.get("init_from", ""))
    return str(run_module.run(workload, recipe, groups))


def train(
    run_dir: Path,
    world_size: int,
    parallel: ParallelConfig,
    last_step: int,
    trainable: tuple[Module, ...] = STAGE3,
    **options: Any,
) -> dict[str, Tensor]:
    """All tensors of the checkpoint a leg ends with: weights and moments."""
    paths = results_of_ranks(train_leg, world_size, run_dir, parallel, last_step, trainable, options)
    assert len(set(paths)) == 1
    reader = open_checkpoint(Path(paths[0]))
    assert reader.step == last_step
    assert reader.read_state().consumed_rows == last_step * 8
    return {name: reader.read(name) for name in reader.names}


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(("optimizer.", "rng/"))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("one"), 1, fp32(), STEPS)


def forget_moments() -> None:
    restoring.held_moments = lambda *args: []


def start_the_order_again() -> None:
    whole = TinyWorkload.batches
    TinyWorkload.batches = lambda self, dp_rank, dp_size, first, last: whole(self, dp_rank, dp_size, 0, last - first)


@pytest.mark.parametrize("patch", [forget_moments, start_the_order_again])
def test_trap_resume_forgets(
    patch: Callable[[], None],
    uninterrupted: dict[str, Tensor],
    run_dir: Path,
    record_property: Callable[[str, object], None],
) -> None:
    train(run_dir, 1, fp32(), HALF)
    found = train(run_dir, 1, fp32(), STEPS, patch=patch)
    figure = difference(weights_of(found), weights_of(uninterrupted))
    record_property("over_bar", figure / BAR)
    assert figure >= FACTOR * BAR


def round_masters() -> None:
    fill = CheckpointReader.fill

    def fill_rounded(reader: CheckpointReader, targets: Iterable[Slice]) -> None:
        pieces = list(targets)
        fill(reader, pieces)
        for piece in pieces:
            if not piece.name.startswith("optimizer."):
                piece.tensor.copy_(piece.tensor.bfloat16())

    CheckpointReader.fill = fill_rounded


def test_trap_masters_made_of_rounded_weights(run_dir: Path) -> None:
    """bf16: fp32 weights that were filled from rounded ones have lost their low bits."""
    expected = weights_of(train(run_dir / "whole", 1, ParallelConfig(), STEPS))
    train(run_dir / "halves", 1, ParallelConfig(), HALF)
    found = weights_of(train(run_dir / "halves", 1, ParallelConfig(), STEPS, patch=round_masters))
    assert not all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_finished_run_is_left_alone(run_dir: Path) -> None:
    train(run_dir, 1, fp32(), 1)
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").glob("step-*/*")}
    train(run_dir, 1, fp32(), 1)
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").glob("step-*/*")}


def test_another_plan_is_refused(run_dir: Path) -> None:
    train(run_dir, 1, fp32(), 1)
    with pytest.raises(ProcessRaisedException, match="trained under data plan tiny, the configuration now gives other"):
        train(run_dir, 1, fp32(), 2, plan_digest="other")


def test_a_stage_starts_from_weights_alone(run_dir: Path) -> None:
    stage1 = train(run_dir / "stage1", 1, fp32(), STEPS, STAGE1)
    (checkpoint,) = (run_dir / "stage1" / "checkpoints").glob("step-*")
    stage3 = train(run_dir / "stage3", 2, fp32(2), 1, STAGE3, init_from=str(checkpoint))
    moments = [value for name, value in stage3.items() if name.startswith("optimizer.exp_avg_sq/")]
    assert len(moments) > len([name for name in stage1 if name.startswith("optimizer.exp_avg_sq/")])
    first, second = weights_of(stage1), weights_of(stage3)
    assert first.keys() == second.keys()
    # AdamW's first update is at most its rate, here the first of the warm-up, beside decay. Weights that ignored
    # stage I's four steps would lie further off.
    step = 1.5 * 1e-3 / 2
    for name, value in first.items():
        moved = (second[name] - value).abs().max().item()
        assert 0 < moved <= step, name


def wider(backbone: BackboneConfig) -> BackboneConfig:
    return replace(backbone, ffn_hidden_size=96)


def deeper(backbone: BackboneConfig) -> BackboneConfig:
    return replace(backbone, num_layers=6)


def shallower(backbone: BackboneConfig) -> BackboneConfig:
    return replace(backbone, num_layers=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"8 parameters differ of \d+ there, first decoder.layers.0.mlp.linear_fc1.weight, which is "),
        (deeper, r"12 parameters differ of \d+ there, first decoder.layers.4.\S+, which is not in the checkpoint"),
        (shallower, r"12 parameters differ of \d+ there, first decoder.layers.2.\S+, which is not in the model"),
    ],
)
@pytest.mark.parametrize("parallel", [fp32(), fp32(1, 2)], ids=["one", "pp2"])
def test_a_checkpoint_of_another_model_is_refused(
    parallel: ParallelConfig,
    change: Callable[[BackboneConfig], BackboneConfig],
    message: str,
    small: str,
    run_dir: Path,
) -> None:
    """In one line, with all that differs counted over the ranks, and the same on each."""
    import tests.support.tiny as tiny

    def with_another_shape() -> None:
        model = tiny.tiny_model()
        changed = replace(model, backbone=change(model.backbone))
        tiny.tiny_model = lambda: changed

    def told() -> str:
        try:
            train_leg(run_dir / "other", parallel, 1, STAGE3, {"init_from": small, "patch": with_another_shape})
        except UserError as error:
            return str(error)
        return "not refused"

    answers = results_of_ranks(told, parallel.pp_size)
    assert len(set(answers)) == 1
    assert re.search("a checkpoint of another model: " + message, answers[0]), answers[0]
    assert "\n" not in answers[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("small")
    train(run_dir, 1, fp32(), 1)
    return str(run_dir / "checkpoints" / "step-00000001")
