"""Whoever watches a run changes nothing in it: validation, samples, monitors, profiler and collection, bit for bit."""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.schema import (
    Backend,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
    SamplesConfig,
    StageConfig,
    ValidationConfig,
    ValidationSet,
)
from janus_mega.engine.state import weight_slices
from janus_mega.observe.sinks import SinkGroup, read_metrics
from janus_mega.parallel.groups import build_groups
from janus_mega.train.hooks.monitors import MonitorHook
from janus_mega.train.hooks.validation import ValidationHook
from janus_mega.train.janus import train_janus
from janus_mega.train.loop import StepEvent
from janus_mega.train.run import build_engine
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.shards import TinyShards, make_shards
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_model, tiny_recipe
from tests.support.trained import make_image_tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

import_what_ranks_need()

LAYOUTS = {
    "one": (1, fp32()),
    "dp2_zero3": (2, fp32(zero_stage=3)),
    "tp2_sp": (2, fp32(2, sequence_parallel=True)),
    "pp2_interleaved": (2, fp32(1, 2, virtual_pp_size=2)),
    "pp2_recompute_full": (2, fp32(1, 2, recompute=Recompute.full)),
    "megatron_dp2_pp2": (4, fp32(1, 2, backend=Backend.megatron)),
}
SCORED_BAR = 5e-6  # as for losses between layouts; measured worst 2e-7
MONITOR_BAR = 1e-4  # maxima of single values; measured worst 0


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.values.update(values)


def steps_of(parallel: ParallelConfig, scores: bool, run_dir: Path) -> dict[str, Any]:
    """Two steps of training, with the batches of each scored right before and the second monitored, if asked."""
    groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
    workload = TinyWorkload(STAGE3, parallel)
    engine, shards = build_engine(workload, tiny_recipe(run_dir, parallel, 2), groups)
    layout = groups.layout
    recorder = Recorder()
    monitor = MonitorHook(engine, groups, SinkGroup([recorder]), every=1)
    found: dict[str, Any] = {"trained": [], "norms": [], "scored": [], "same_generators": True}
    for batches in workload.batches(layout.dp_rank, layout.dp_size, 0, 2):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        placed = [workload.place(batch, groups) for batch in batches]
        if scores:
            before = torch.get_rng_state(), random.getstate()
            sums, labels = engine.score(placed, counts)
            found["scored"].append((sums / labels).tolist())
            same = torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
            found["same_generators"] &= same
        result = engine.train_step(placed, counts, 1e-3)
        found["trained"].append([result.task_losses.get(name, float("nan")) for name in workload.task_names])
        found["norms"].append(result.grad_norm)
        if scores:
            monitor.after_step(StepEvent(len(found["norms"]), result, [], 0.0, 0.0))
    monitor.at_end(2)
    found["monitored"] = recorder.values
    found["weights"] = {f"{piece.name} {piece.offset}": piece.tensor.clone() for piece in weight_slices(engine, shards)}
    return found


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    (found,) = results_of_ranks(steps_of, 1, fp32(), True, tmp_path_factory.mktemp("one"))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_scoring_gives_the_loss_of_training_and_changes_nothing(name: str, by_one: Any, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[name]
    plain = results_of_ranks(steps_of, world_size, parallel, False, tmp_path)
    for alone, scored in zip(plain, results_of_ranks(steps_of, world_size, parallel, True, tmp_path), strict=True):
        assert scored["scored"] == scored["trained"]
        assert scored["same_generators"]
        assert (scored["trained"], scored["norms"]) == (alone["trained"], alone["norms"])
        assert all(torch.equal(scored["weights"][key], tensor) for key, tensor in alone["weights"].items())
        np.testing.assert_allclose(scored["scored"], by_one["scored"], rtol=SCORED_BAR)
        assert scored["monitored"].keys() == by_one["monitored"].keys()
        for key, value in by_one["monitored"].items():
            assert scored["monitored"][key] == pytest.approx(value, rel=MONITOR_BAR), key


def validated_then_trained(run_dir: Path) -> tuple[dict[str, float], dict[str, float], float]:
    """Validation of the first step's rows at once, and in four parts, then that step's loss."""
    parallel = fp32()
    groups = build_groups(1, 1)
    workload = TinyWorkload(STAGE3, parallel)
    workload.task_weights = {"text": 2.0, "understanding": 1.0, "generation": 0.5}
    recipe = replace(tiny_recipe(run_dir, parallel, 2), validate_every=1)
    engine, _ = build_engine(workload, recipe, groups)
    found = []
    for rows_at_a_time in (8, 2):
        recorder = Recorder()
        recipe = replace(recipe, global_batch_size=rows_at_a_time)
        ValidationHook(workload, groups, engine, SinkGroup([recorder]), recipe, {}).at_end(0)
        found.append(recorder.values)
    (batches,) = workload.batches(0, 1, 0, 1)
    counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
    result = engine.train_step([workload.place(batch, groups) for batch in batches], counts, 1e-3)
    return found[0], found[1], result.loss


def test_validation_of_the_rows_of_a_step_is_the_loss_of_that_step(tmp_path: Path) -> None:
    ((at_once, in_parts, loss),) = results_of_ranks(validated_then_trained, 1, tmp_path)
    assert at_once["validation/step_0/loss"] == pytest.approx(loss, rel=1e-6)
    assert in_parts == pytest.approx(at_once, rel=1e-6)
    assert at_once["validation/step_1/loss"] != at_once["validation/step_0/loss"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TinyShards:
    return make_shards(tmp_path_factory.mktemp("shards"))


def plain_config(shards: TinyShards, run_dir: Path, parallel: ParallelConfig) -> RunConfig:
    model = tiny_model()
    model = replace(
        model,
        backbone=replace(model.backbone, vocab_size=512),
        image_tokenizer=replace(model.image_tokenizer, codebook_size=shards.spec.geometry.codebook_size),
    )
    tokenizer = make_image_tokenizer(model, run_dir.parent / "image_tokenizer")
    sources = {**shards.spec.sources, "drawings": replace(shards.spec.sources["drawings"], weight=0.0)}
    return RunConfig(
        name="tiny",
        run_dir=str(run_dir),
        model=model,
        data=replace(shards.spec, sources=sources, image_tokenizer=str(tokenizer)),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3, lr_scales={"understanding_encoder": 0.5}),
        stage=StageConfig(name="stage3", trainable=list(STAGE3), num_steps=4, global_batch_size=4),
        logging=LoggingConfig(log_every=2, tensorboard=False),
    )


def watched(config: RunConfig, run_dir: Path, picture: Path) -> RunConfig:
    return replace(
        config,
        run_dir=str(run_dir),
        logging=LoggingConfig(
            log_every=2, tensorboard=True, monitor_every=2, profile_steps=[2, 3], gc_every=3, peak_flops=1e12
        ),
        validation=ValidationConfig(
            every=3,
            sets={
                "held_out": ValidationSet(sources=["drawings"], num_rows=4),
                "mixture": ValidationSet(seed=5, num_rows=12),
            },
        ),
        samples=SamplesConfig(
            every=2, captions=["the one", "the two"], questions={str(picture): "what is it"}, max_new_tokens=3
        ),
    )


def train(config: RunConfig) -> str:
    return str(train_janus(config))


@pytest.mark.parametrize(("world_size", "parallel"), [(1, fp32()), (2, fp32(1, 2))], ids=["one", "pp2"])
def test_a_watched_run_is_the_same_run(
    world_size: int, parallel: ParallelConfig, shards: TinyShards, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 16), (200, 10, 10)).save(picture)
    config = plain_config(shards, tmp_path / "plain", parallel)
    watching = watched(config, tmp_path / "watched", picture)
    checkpoints = [open_checkpoint(Path(results_of_ranks(train, world_size, each)[0])) for each in (config, watching)]
    plain, seen = (checkpoint.names for checkpoint in checkpoints)
    assert plain == seen
    assert all(torch.equal(checkpoints[0].read(name), checkpoints[1].read(name)) for name in plain)

    rows, all_rows = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "watched")
    lines = [row for row in all_rows if "loss" in row]
    assert [row["loss"] for row in lines] == [row["loss"] for row in rows]
    assert [row["grad_norm"] for row in lines] == [row["grad_norm"] for row in rows]
    assert {"mfu_causal", "mfu_palm", "mfu_documents", "hfu", "padding_share"} <= lines[0].keys()
    assert lines[0]["mfu_documents"] < lines[0]["mfu_causal"] < lines[0]["mfu_palm"] == lines[0]["hfu"]
    assert lines[0]["lr/understanding_encoder"] == lines[0]["lr"] / 2
    planned = sum(value for key, value in lines[0].items() if key.startswith("source_tokens/"))
    assert planned == lines[0]["amount/tokens"] * 2
    check_what_watchers_wrote(all_rows, tmp_path / "watched")


def check_what_watchers_wrote(rows: list[dict[str, Any]], run_dir: Path) -> None:
    validated = {row["step"]: row for row in rows if "validation/mixture/loss" in row}
    assert sorted(validated) == [3, 4]
    held_out = {key for key in validated[3] if key.startswith("validation/held_out")}
    assert held_out == {"validation/held_out/loss", "validation/held_out/loss/generation"}
    monitored = {row["step"]: row for row in rows if "monitor/layer_3/rms" in row}
    assert sorted(monitored) == [2, 4]
    assert all(
        0 < monitored[2][f"monitor/layer_{layer}/rms"] < monitored[2][f"monitor/layer_{layer}/largest"]
        for layer in range(4)
    )
    assert json.loads((run_dir / "profile" / "steps-2-3-rank-0.json").read_text())["traceEvents"]
    sample = json.loads((run_dir / "samples" / "step-00000004.json").read_text())
    assert (len(sample["captions"]), len(sample["answers"])) == (2, 1)
    assert 0 < sample["codebook_use"] <= 1 and 0 < sample["code_entropy_bits"] <= 8
    with Image.open(run_dir / "samples" / "step-00000002.png") as drawn:
        assert drawn.size == (32, 16)
    assert not (run_dir / "samples" / "weights").exists()
