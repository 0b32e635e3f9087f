"""Real shards through JanusWorkload: the layout check a run ends with, and that it sees a layout which trains wrong."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from data_pipeline.spec import Task
from janus_mega.cli.main import app
from janus_mega.config.load import save
from janus_mega.config.schema import OptimizerConfig, RunConfig, StageConfig
from janus_mega.config.validate import validate_run
from janus_mega.parallel import replicated
from janus_mega.train.janus import JanusWorkload, recipe_of
from janus_mega.train.layout_check import CheckedLayout, LayoutFigures, check_layouts, verify_layout
from tests.support.ranks import import_what_ranks_need
from tests.support.shards import TinyShards, make_shards
from tests.support.tiny import STAGE1, STAGE3, fp32, tiny_model

pytestmark = pytest.mark.dist

LOSS_BAR = 5e-6  # measured worst 2e-7
NORM_BAR = 1e-5  # measured worst 2e-7
WEIGHT_BAR = 1e-5  # measured worst 6e-6
SEQUENCE_PARALLEL = CheckedLayout("tp 2 + sequence parallel", 2, tp_size=2, sequence_parallel=True)
DATA_PARALLEL = CheckedLayout("dp 2, ZeRO-1", 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TinyShards:
    import_what_ranks_need()
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def config(shards: TinyShards) -> RunConfig:
    model = tiny_model()
    model = replace(
        model,
        backbone=replace(model.backbone, vocab_size=512),
        image_tokenizer=replace(model.image_tokenizer, codebook_size=shards.spec.geometry.codebook_size),
    )
    return RunConfig(
        name="tiny",
        run_dir="unused",
        model=model,
        data=shards.spec,
        parallel=fp32(),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad_norm=0.1),
        stage=StageConfig(name="stage3", trainable=list(STAGE3), num_steps=5, global_batch_size=8),
    )


def check(config: RunConfig, path: Path, layout: CheckedLayout, stage: str = "stage3") -> LayoutFigures:
    (figures,) = check_layouts(config, {stage: STAGE1 if stage == "stage1" else STAGE3}, path, [layout])
    return figures


def test_the_configuration_is_a_valid_run(config: RunConfig) -> None:
    validate_run(config)


@pytest.mark.parametrize(
    ("layout", "stage"),
    [(SEQUENCE_PARALLEL, "stage3"), (DATA_PARALLEL, "stage1")],
    ids=["sequence_parallel", "data_parallel"],
)
def test_layouts_agree_on_real_rows(
    layout: CheckedLayout, stage: str, config: RunConfig, tmp_path: Path, record_property
) -> None:
    figures = check(config, tmp_path, layout, stage)
    record_property("figures", str(figures))
    assert (figures.stage, figures.layout) == (stage, layout.name)
    assert figures.max_loss_diff <= LOSS_BAR
    assert figures.max_norm_diff <= NORM_BAR
    assert figures.max_module_diff <= NORM_BAR
    assert figures.max_weight_diff <= WEIGHT_BAR


def test_real_rows_through_a_shrunken_model(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, parallel=replace(config.parallel, micro_batch_size=2))
    verdict = verify_layout(config, 2, tmp_path, num_steps=2, real_rows=True)
    assert verdict.passed and len(verdict.found["losses"]) == 2, verdict.worst


def test_real_rows_under_a_launcher(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(replace(config, run_dir=str(tmp_path / "run")), tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["verify-layout", str(tmp_path / "run.yaml"), "--steps", "2", "--real-rows"]
    command += ["-m", "janus_mega.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert "tp 1 x pp 1 x dp 2" in done.stdout and "EQUAL in" in done.stdout

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    refused = CliRunner().invoke(app, [*words, "data.sources.text.path=/nowhere/at/all"])
    assert isinstance(refused.exception, UserError) and "/nowhere/at/all" in str(
        refused.exception
    )  # not synthetic ones


def test_the_check_sees_norm_gradients_that_are_not_summed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property
) -> None:
    monkeypatch.setattr(replicated, "REPLICATED_RULES", ())  # the ranks are forks of this process
    figures = check(config, tmp_path, SEQUENCE_PARALLEL)
    record_property("over_bar", figures.max_norm_diff / NORM_BAR)
    assert figures.max_norm_diff >= 5 * NORM_BAR


def test_amounts_of_a_batch(config: RunConfig) -> None:
    workload = JanusWorkload(config)
    (batches,) = list(workload.batches(0, 1, 0, 1))
    amounts = [workload.measure(batch) for batch in batches]
    assert len(amounts) == 8
    assert all(amount["tokens"] + amount["padding"] == config.data.seq_len for amount in amounts)
    assert sum(amount["understanding_images"] for amount in amounts) > 0
    assert sum(amount["generation_tokens"] for amount in amounts) % 16 == 0
    counts = sum(workload.count_labels(batch) for batch in batches)
    assert counts.tolist()[2] == sum(amount["generation_tokens"] for amount in amounts)


def test_dp_ranks_share_the_rows_of_a_step(config: RunConfig) -> None:
    workload = JanusWorkload(config)

    def rows(dp_rank: int, dp_size: int) -> list[tuple[int, ...]]:
        (batches,) = list(workload.batches(dp_rank, dp_size, 1, 2))
        return [tuple(batch["input_ids"].flatten().tolist()) for batch in batches]

    assert sorted(rows(0, 2) + rows(1, 2)) == sorted(rows(0, 1))


def test_the_recipe_is_the_configuration(config: RunConfig) -> None:
    recipe = recipe_of(replace(config, stage=replace(config.stage, stop_at_step=3)))
    assert (recipe.num_steps, recipe.last_step, recipe.global_batch_size) == (5, 3, 8)
    assert recipe.optimizer is config.optimizer and recipe.run_dir == Path("unused")


def test_another_order_is_another_plan(config: RunConfig) -> None:
    digest = JanusWorkload(config).order.digest
    assert JanusWorkload(config).order.digest == digest
    assert JanusWorkload(replace(config, data=replace(config.data, seed=1))).order.digest != digest


def test_a_model_with_too_few_rows_is_refused(config: RunConfig) -> None:
    model = replace(config.model, backbone=replace(config.model.backbone, vocab_size=128))
    with pytest.raises(UserError, match=r"holds \d+ ids, the model has 128 rows; raise model.backbone.vocab_size"):
        JanusWorkload(replace(config, model=model))


def test_sources_of_another_task_are_refused(config: RunConfig) -> None:
    text = replace(config.data.sources["text"], task=Task.generation)
    with pytest.raises(UserError, match="text"):
        JanusWorkload(replace(config, data=replace(config.data, sources={**config.data.sources, "text": text})))
