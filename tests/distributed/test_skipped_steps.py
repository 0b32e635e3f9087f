"""A step that is no number on one rank is left out on all: the run then equals, bit for bit, one without its batch."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.explain.blame import blame_step
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.schema import Backend, CheckpointConfig, HealthConfig, ParallelConfig, RunConfig, Schedule
from janus_mega.engine.interface import StepResult
from janus_mega.engine.state import moment_slices, weight_slices
from janus_mega.engine.step import ScheduledEngine
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.train import run as run_module
from janus_mega.train.health import Health
from janus_mega.train.janus import JanusWorkload, train_janus
from janus_mega.train.run import build_engine
from tests.distributed.layout_runs import import_what_ranks_need
from tests.distributed.test_data_log import config_of
from tests.support.ranks import results_of_ranks
from tests.support.shards import make_shards
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist

import_what_ranks_need()

ROWS = {"micro_batch_size": 2}
"""Two micro-batches for each of two dp ranks: enough to accumulate over."""
LAYOUTS = {
    "dp2_zero1": fp32(**ROWS),
    "dp2_zero2": fp32(zero_stage=2, **ROWS),
    "dp2_zero3": fp32(zero_stage=3, **ROWS),
    "megatron_dp2": fp32(backend=Backend.megatron, **ROWS),
    "tp2": fp32(2, **ROWS),
    "pp2": fp32(1, 2, **ROWS),
    "dp2_zero1_bf16": ParallelConfig(**ROWS),
    "dp2_zero2_bf16": ParallelConfig(zero_stage=2, **ROWS),
    "dp2_zero3_bf16": ParallelConfig(zero_stage=3, **ROWS),
}
SPOILT = ("loss", "gradient", "verdict")
"""NaN in the loss of one task, NaN in one gradient, and nothing wrong at all but refused, as spikes are."""
BAD_BATCH = 1
LAST_BATCH = 3


def train_all(parallel: ParallelConfig, tmp_path: Path) -> dict[str, Any]:
    """Without the batch, and with it spoilt in two ways."""
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    return {spoil: state_after(parallel, spoil, groups, tmp_path) for spoil in ("", *SPOILT)}


def state_after(parallel: ParallelConfig, spoil: str, groups: ProcessGroups, tmp_path: Path) -> dict[str, Any]:
    """Trains on batches 0, 2 and 3, with batch 1 spoilt in between unless spoil is empty."""
    workload = TinyWorkload(STAGE3, parallel)
    health = Health(HealthConfig())
    numbers = iter(range(LAST_BATCH + 1))

    def judge(values: Mapping[str, float]) -> str:
        return "refused" if spoil == "verdict" and next(numbers) == BAD_BATCH else health.judge(values)

    engine, shards = build_engine(workload, tiny_recipe(tmp_path, parallel, 4), groups, None, judge)
    results: list[StepResult] = []
    for number in range(LAST_BATCH + 1):
        if number == BAD_BATCH and not spoil:
            continue
        rank = torch.distributed.get_world_size() - 1
        undo = _spoilt(engine, spoil, rank) if number == BAD_BATCH else lambda: None
        results.append(step_on(engine, workload, groups, number))
        undo()
        health.note(number, results[-1].skipped)
    slices = [*weight_slices(engine, shards), *moment_slices(engine, shards)]
    return {
        "skipped": [result.skipped for result in results],
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "updates": health.updates,
        "tensors": {f"{piece.name}@{piece.offset}": piece.tensor.clone() for piece in slices},
        "parameters": {f"local {n}": p.detach().clone() for c in engine.chunks for n, p in c.named_parameters()},
    }


def _spoilt(engine: Any, spoil: str, rank: int) -> Callable[[], None]:
    """Makes one rank's loss of one task, or one of its gradients, NaN; returns what undoes it."""
    if spoil == "verdict" or torch.distributed.get_rank() != rank:
        return lambda: None
    if spoil == "gradient":
        parameter = next(p for p in engine.chunks[-1].parameters() if p.requires_grad)
        return parameter.register_hook(lambda gradient: gradient * math.nan).remove
    scheduled = engine._scheduled[-1]
    forward = scheduled._forward
    factors = torch.tensor([1.0, math.nan, 1.0])  # rank is in the last pipeline rank, whose outputs are losses by task
    object.__setattr__(scheduled, "_forward", lambda micro_batch: forward(micro_batch) * factors)
    return lambda: object.__setattr__(scheduled, "_forward", forward)


def step_on(engine: Any, workload: TinyWorkload, groups: ProcessGroups, number: int) -> StepResult:
    layout = groups.layout
    (batches,) = workload.batches(layout.dp_rank, layout.dp_size, number, number + 1)
    counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
    return engine.train_step([workload.place(batch, groups) for batch in batches], counts, lr=1e-3 * (1 + number))


OFTEN = {"dp2_zero1", "dp2_zero2", "dp2_zero3", "megatron_dp2", "dp2_zero1_bf16"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.seldom) for name in LAYOUTS]
)
def test_a_skipped_step_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    parallel = LAYOUTS[name]
    ranks = results_of_ranks(train_all, 2, parallel, tmp_path)
    for rank in ranks:
        for spoil in SPOILT:
            found, expected = rank[spoil], rank[""]
            assert [bool(reason) for reason in found["skipped"]] == [False, True, False, False], spoil
            assert found["skipped"] == ranks[0][spoil]["skipped"]
            assert found["updates"] == 3
            assert math.isfinite(found["losses"][BAD_BATCH]) == (spoil != "loss")
            for key in ("losses", "norms"):
                assert [found[key][i] for i in (0, 2, 3)] == expected[key], (spoil, key)
            for key in ("tensors", "parameters"):
                differ = [n for n, value in expected[key].items() if not torch.equal(found[key][n], value)]
                assert (differ, found[key].keys()) == ([], expected[key].keys()), spoil


PARALLEL = {
    "dp2_zero3": fp32(zero_stage=3, **ROWS),
    "megatron_dp2": fp32(backend=Backend.megatron, **ROWS),
    "dp2_bf16": ParallelConfig(**ROWS),
}
NUM_STEPS = 6


class SpoiltWorkload(TinyWorkload):
    """Batches after some of its steps are no numbers on dp rank 1."""

    def __init__(self, parallel: ParallelConfig, bad: tuple[int, ...]) -> None:
        super().__init__(STAGE3, parallel)
        self._bad = bad

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        for step, batches in enumerate(super().batches(dp_rank, dp_size, first_step, last_step), first_step):
            for batch in batches:
                batch["is_bad"] = torch.tensor(step in self._bad and dp_rank == 1)
            yield batches

    def place(self, batch: dict[str, Tensor], groups: ProcessGroups) -> Any:
        placed = super().place({name: value for name, value in batch.items() if name != "is_bad"}, groups)
        return _Bad(placed) if batch["is_bad"] else placed


class _Bad:
    """A placed batch whose losses are no numbers."""

    def __init__(self, placed: Any) -> None:
        self.placed = placed


def train_run(run_dir: Path, parallel: ParallelConfig, options: dict[str, Any]) -> str:
    """A run through train.run; the path of its last checkpoint, or the error it stopped with."""
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    workload = SpoiltWorkload(parallel, options["bad"])
    recipe = tiny_recipe(run_dir, parallel, options.get("last_step", NUM_STEPS), schedule=Schedule.cosine)
    recipe = replace(
        recipe,
        num_steps=NUM_STEPS,
        checkpoint=CheckpointConfig(save_every=1, keep_last=10),
        health=HealthConfig(max_skips_in_a_row=2, **options.get("health", {})),
    )
    build = run_module.build_engine

    def build_spoilt(*arguments: Any) -> Any:
        engine, shards = build(*arguments)
        assert isinstance(engine, ScheduledEngine)
        for scheduled in engine._scheduled:
            object.__setattr__(scheduled, "_forward", _spoiling(scheduled._forward, options.get("factor", math.nan)))
        return engine, shards

    run_module.build_engine = build_spoilt
    try:
        return str(run_module.run(workload, recipe, groups))
    except UserError as error:
        return str(error)


def _spoiling(forward: Callable[[Any], Tensor], factor: float) -> Callable[[Any], Tensor]:
    return lambda batch: forward(batch.placed) * factor if isinstance(batch, _Bad) else forward(batch)


def tensors_of(path: str) -> dict[str, Tensor]:
    reader = open_checkpoint(Path(path))
    return {name: reader.read(name) for name in reader.names}


def checkpoint_at(run_dir: Path, step: int) -> str:
    return str(sorted((run_dir / "checkpoints").glob(f"step-{step:08d}*"))[-1])


def assert_equal(found: str, expected: str) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", PARALLEL)
def test_after_skips_in_a_row_the_run_goes_back_and_on(name: str, tmp_path: Path) -> None:
    """Batches 3 and 4 are bad (steps 4 and 5): step 3 is undone too, the last batch then trains step 2."""
    parallel = PARALLEL[name]
    found = results_of_ranks(train_run, 2, tmp_path / "run", parallel, {"bad": (3, 4)})
    assert found == [checkpoint_at(tmp_path / "run", NUM_STEPS)] * 2
    assert_equal(checkpoint_at(tmp_path / "run", 5), checkpoint_at(tmp_path / "run", 2))
    state = open_checkpoint(Path(found[0])).read_state()
    assert (state.step, state.consumed_rows) == (NUM_STEPS, 8 * NUM_STEPS)
    assert state.health["rewinds"] == [[2, 5]]
    assert state.health["updates"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [4, 5, None]
    assert (lines[2]["first_step"], lines[2]["last_step"]) == (3, 3)
    assert lines[0]["samples"] == []
    assert lines[0]["loss"] is None
    if name != "dp2_bf16":
        return
    # The same from a resume: stopped after going back, then the last step.
    results_of_ranks(train_run, 2, tmp_path / "halves", parallel, {"bad": (3, 4), "last_step": 5})
    (resumed, _) = results_of_ranks(train_run, 2, tmp_path / "halves", parallel, {"bad": (3, 4)})
    assert_equal(resumed, found[0])


def test_a_run_that_may_not_go_back_stops_with_one_line(tmp_path: Path) -> None:
    options = {"bad": (2, 3), "health": {"max_rewinds": 0}}
    for message in results_of_ranks(train_run, 2, tmp_path, fp32(), options):
        assert message.startswith("step 4: the updates of 2 steps in a row were left out")
        assert "health.max_rewinds 0" in message
    for message in results_of_ranks(train_run, 2, tmp_path / "early", fp32(), {"bad": (0, 1)}):
        assert "there is no checkpoint before step 0" in message


def test_a_spike_on_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    options = {"bad": (4,), "factor": 100.0, "health": {"spike_sigmas": 6.0, "spike_window": 8}}
    results_of_ranks(train_run, 2, tmp_path, fp32(), options)
    assert_equal(checkpoint_at(tmp_path, 5), checkpoint_at(tmp_path, 4))
    (line,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert line["step"] == 5
    assert "deviations above" in line["why"]
    health = open_checkpoint(Path(checkpoint_at(tmp_path, NUM_STEPS))).read_state().health
    assert len(health["windows"]["loss"]) == health["updates"] == NUM_STEPS - 1


def train_planned(config: RunConfig) -> list[str]:
    """A run over prepared data whose third batch is no number; the documents of that batch by the plan."""
    place, steps = JanusWorkload.place, iter(range(10))

    def spoilt(self: JanusWorkload, batch: dict[str, Tensor], groups: ProcessGroups) -> Any:
        if next(steps) == 2:
            self.denominators = lambda counts: torch.full_like(counts, math.nan, dtype=torch.float64)
        elif "denominators" in vars(self):
            del self.denominators
        return place(self, batch, groups)

    JanusWorkload.place = spoilt
    train_janus(config)
    return [found.uid for found in blame_step(JanusWorkload(config).data, 3)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_samples_of_a_skipped_batch_are_recorded(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    config = config_of(shards, tmp_path / "run")
    config = replace(config, parallel=replace(config.parallel, micro_batch_size=config.stage.global_batch_size))
    (uids,) = results_of_ranks(train_planned, 1, config)
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert line["step"] == 3
    assert [sample["uid"] for sample in line["samples"]] == uids
    assert uids
    assert {sample["source"] for sample in line["samples"]} <= set(config.data.sources)
