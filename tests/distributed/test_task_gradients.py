"""Gradients per task: the right numbers in any layout, and no trace in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.schema import TaskId
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.schema import Backend, ParallelConfig, Recompute
from janus_mega.observe.sinks import read_metrics
from janus_mega.parallel.groups import build_groups
from janus_mega.train.hooks.task_gradients import task_gradients
from janus_mega.train.run import build_engine, run
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist

import_what_ranks_need()

BAR = 1e-6  # measured worst 7e-8
NUM_STEPS = 2


def train(run_dir: Path, parallel: ParallelConfig, looks: bool) -> dict[str, Any]:
    """Weights, losses and random state after some steps; figures of each step if it looks."""
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    workload = TinyWorkload(STAGE3, parallel)
    engine, shards = build_engine(workload, tiny_recipe(run_dir, parallel, NUM_STEPS), groups)
    layout = groups.layout
    found: dict[str, Any] = {"losses": [], "figures": []}
    for batches in workload.batches(layout.dp_rank, layout.dp_size, 0, NUM_STEPS):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        result = engine.train_step([workload.place(batch, groups) for batch in batches], counts, lr=1e-3)
        found["losses"].append((result.loss, result.grad_norm))
        if looks:
            before = [_gradient(shard.parameter) for shard in shards]
            found["figures"].append(task_gradients(engine.chunks[0], workload, batches[0], groups))
            after = [_gradient(shard.parameter) for shard in shards]
            found["untouched"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    found["weights"] = [shard.parameter.detach().clone() for shard in shards]
    found["random"] = torch.get_rng_state()
    return found


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    grads = [getattr(parameter, name, None) for name in ("grad", "main_grad")]
    return torch.cat([torch.zeros(1), *(grad.flatten().float() for grad in grads if grad is not None)]).clone()


LAYOUTS = {
    "one": (1, fp32()),
    "tp2_sp": (2, fp32(2, sequence_parallel=True)),
    "dp2_zero2": (2, fp32(zero_stage=2)),
    "recompute_full": (1, fp32(recompute=Recompute.full)),
    "megatron_dp2": (2, fp32(backend=Backend.megatron)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_does_not_notice(name: str, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[name]
    with_hook = results_of_ranks(train, world_size, tmp_path, parallel, True)
    without = results_of_ranks(train, world_size, tmp_path, parallel, False)
    for looked, plain in zip(with_hook, without, strict=True):
        assert looked["untouched"]
        assert looked["losses"] == plain["losses"]
        assert torch.equal(looked["random"], plain["random"])
        assert all(torch.equal(a, b) for a, b in zip(looked["weights"], plain["weights"], strict=True))
        assert looked["figures"] == with_hook[0]["figures"]


def plain_figures(run_dir: Path, rows: int) -> dict[str, float]:
    """The same figures of the first step from three whole backward passes on one rank, over `rows` rows at once."""
    parallel = fp32(micro_batch_size=rows)
    groups = build_groups(1, 1)
    workload = TinyWorkload(STAGE3, parallel)
    engine, _ = build_engine(workload, tiny_recipe(run_dir, parallel, 1), groups)
    chunk = engine.chunks[0]
    (batch, *_) = next(workload.batches(0, 1, 0, 1))
    gradients = []
    for task in TaskId:
        placed = workload.place(batch, groups)
        chunk.set_input_tensor([None])
        parts = torch.autograd.grad(chunk(placed)[task], list(chunk.decoder.parameters()))
        gradients.append(torch.cat([part.flatten().double() for part in parts]) / max(len(placed.labels[task]), 1))
    norms = {f"gradient/{task.name}": gradients[task].norm().item() for task in TaskId if len(placed.labels[task])}
    pair = gradients[TaskId.understanding], gradients[TaskId.generation]
    return {**norms, "gradient/cosine_understanding_generation": torch.cosine_similarity(*pair, dim=0).item()}


def first_look(run_dir: Path, parallel: ParallelConfig) -> dict[str, float]:
    """Figures of the first step's rows, before any update; dp ranks take every other row of the first two."""
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    workload = TinyWorkload(STAGE3, parallel)
    engine, _ = build_engine(workload, tiny_recipe(run_dir, parallel, 1), groups)
    rows = next(workload.batches(0, 1, 0, 1))
    return task_gradients(engine.chunks[0], workload, rows[groups.layout.dp_rank], groups)


@pytest.mark.parametrize("name", LAYOUTS)
def test_figures_equal_whole_backward_passes(name: str, tmp_path: Path, record_property: Any) -> None:
    world_size, parallel = LAYOUTS[name]
    dp_size = world_size // parallel.tp_size
    (expected,) = results_of_ranks(plain_figures, 1, tmp_path, dp_size)
    for found in results_of_ranks(first_look, world_size, tmp_path, parallel):
        assert found.keys() == expected.keys()
        worst = max(abs(found[key] - value) / (1 if "cosine" in key else value) for key, value in expected.items())
        record_property("worst", worst)
        assert worst <= BAR


def run_with_hook(run_dir: Path, every: int) -> str:
    parallel = fp32()
    groups = build_groups(1, 1)
    recipe = tiny_recipe(run_dir, parallel, 4)
    recipe = replace(recipe, logging=replace(recipe.logging, task_gradients_every=every, monitor_every=every))
    return str(run(TinyWorkload(STAGE3, parallel), recipe, groups))


def test_a_run_writes_them_and_is_the_same_run(tmp_path: Path) -> None:
    """Four steps on two ranks; the third has text alone, the fourth nothing to understand in the first rows."""
    checkpoints = []
    for every in (0, 1, 3):
        checkpoints.append(open_checkpoint(Path(results_of_ranks(run_with_hook, 2, tmp_path / str(every), every)[0])))
    for looked in checkpoints[1:]:
        assert looked.names == checkpoints[0].names
        assert all(torch.equal(looked.read(name), checkpoints[0].read(name)) for name in looked.names)
    assert not any("gradient/text" in row for row in read_metrics(tmp_path / "0"))
    found = {row["step"]: row for row in read_metrics(tmp_path / "1") if "gradient/generation" in row}
    assert sorted(found) == [1, 2, 4]
    assert all(-1 <= found[step]["gradient/cosine_understanding_generation"] <= 1 for step in (1, 2))
    # Monitors look from the second step to the end of the third; the look at the second must not be theirs.
    monitored = [
        [row for row in read_metrics(tmp_path / str(every)) if "monitor/layer_0/rms" in row] for every in (1, 3)
    ]
    at_step_3 = [{**row, "time_s": 0.0} for rows in monitored for row in rows if row["step"] == 3]
    assert len(at_step_3) == 2 and at_step_3[0] == at_step_3[1]
