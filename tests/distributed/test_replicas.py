"""One flipped bit in what a rank holds in copy is found before the next update and its rank named; clean steps alarm
nobody, whatever the layout."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from janus_mega.config.schema import Backend, CheckpointConfig, HealthConfig, Module, ParallelConfig
from janus_mega.engine import deepspeed_backend, replicas
from janus_mega.engine.digests import bits_of, digest, flip_bit
from janus_mega.engine.interface import StatefulEngine
from janus_mega.engine.replicas import CHANGED, MINORITY, STRAY_COPY, STRAY_MASTER, STRAY_PART, UNDECIDED, Replicas
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.train import run as run_module
from janus_mega.train.exits import ReplicasDiffer
from janus_mega.train.run import build_engine
from tests.distributed.layout_runs import import_what_ranks_need
from tests.support.ranks import results_of_ranks
from tests.support.tiny import STAGE1, STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist

import_what_ranks_need()

TRIALS = 50
KINDS = ("sign", "exponent", "mantissa")
"""Bits that trials flip, in turn."""
CLEAN_CHECKS = 50 if os.environ.get("JANUS_FAULTS") == "all" else 5
SMALL = 1000
"""Elements up to which ZeRO-3 keeps a parameter whole here, so that both kinds are there."""

LAYOUTS = {
    "dp2_zero1": (2, fp32()),
    "dp2_zero1_bf16": (2, ParallelConfig()),
    "dp2_zero2_bf16": (2, ParallelConfig(zero_stage=2)),
    "dp2_zero3": (2, fp32(zero_stage=3)),
    "dp2_zero3_bf16": (2, ParallelConfig(zero_stage=3)),
    "megatron_dp2": (2, fp32(backend=Backend.megatron)),
    "megatron_dp2_bf16": (2, ParallelConfig(backend=Backend.megatron)),
    "tp2_sp": (2, fp32(2, sequence_parallel=True)),
    "pp2_bf16": (2, ParallelConfig(pp_size=2)),
    "dp4_zero1_bf16": (4, ParallelConfig()),
    "megatron_dp4": (4, fp32(backend=Backend.megatron)),
    "tp2_dp2_sp_zero2_bf16": (4, ParallelConfig(tp_size=2, sequence_parallel=True, zero_stage=2)),
    "tp2_dp2_sp_zero3": (4, fp32(2, sequence_parallel=True, zero_stage=3)),
    "dp2_pp2_interleaved": (4, fp32(1, 2, virtual_pp_size=2)),
    "megatron_tp2_pp2_sp": (4, fp32(2, 2, sequence_parallel=True, backend=Backend.megatron)),
}
OFTEN = {"dp2_zero1", "dp2_zero3_bf16", "megatron_dp2", "tp2_sp", "tp2_dp2_sp_zero2_bf16"}


def _keep_only_small_ones_whole() -> None:
    plain = deepspeed_backend.deepspeed_config

    def config(*arguments: Any) -> dict[str, Any]:
        options = plain(*arguments)
        options["zero_optimization"]["stage3_param_persistence_threshold"] = SMALL
        return options

    deepspeed_backend.deepspeed_config = config


def _built(
    parallel: ParallelConfig, trainable: tuple[Module, ...], tmp_path: Path
) -> tuple[ProcessGroups, TinyWorkload, StatefulEngine, list[ShardedParameter]]:
    _keep_only_small_ones_whole()
    groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
    workload = TinyWorkload(trainable, parallel)
    engine, shards = build_engine(workload, tiny_recipe(tmp_path, parallel, 3), groups)
    return groups, workload, engine, shards


def _step(engine: StatefulEngine, workload: TinyWorkload, groups: ProcessGroups, number: int) -> None:
    layout = groups.layout
    (batches,) = workload.batches(layout.dp_rank, layout.dp_size, number, number + 1)
    counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
    engine.train_step([workload.place(batch, groups) for batch in batches], counts, lr=1e-3)


def flips(parallel: ParallelConfig, trainable: tuple[Module, ...], tmp_path: Path, trials: int) -> list[Any]:
    """Two clean steps; then, before the update of a third, one flip after the other, each undone.

    Returns:
        Per trial (rank flipped, name, what this rank found odd).
    """
    groups, workload, engine, shards = _built(parallel, trainable, tmp_path)
    looked = Replicas(engine, shards)
    clean: list[bool] = []
    found: list[Any] = []

    def check(is_refused: bool) -> None:
        clean.append(looked.differ())

    def try_all(is_refused: bool) -> None:
        found.extend(_one_flip(looked, shards, groups.layout.rank, trial) for trial in range(trials))
        clean.append(looked.differ())

    for number in range(3):
        looked.note_published()
        engine.before_update = check if number < 2 else try_all
        _step(engine, workload, groups, number)
    assert clean == [False] * 3
    return found


def _one_flip(looked: Replicas, shards: list[ShardedParameter], rank: int, trial: int) -> tuple[int, str, list[Any]]:
    """One bit of any element that a random rank holds of a random parameter."""
    chance = random.Random(trial)
    victim = chance.randrange(dist.get_world_size())
    choice, where, kind = chance.random(), chance.random(), KINDS[trial % len(KINDS)]
    name = ""
    if rank == victim:
        held = [number for number in range(len(shards)) if looked.held(number)[0].numel()]
        number = held[int(choice * len(held))]
        name, values = shards[number].name, looked.held(number)[0]
        width = 8 * values.element_size()
        mantissa = 23 if width == 32 else 7
        bits = {"sign": (width - 1, width), "exponent": (mantissa, width - 1), "mantissa": (0, mantissa)}
        bit = chance.randrange(*bits[kind])
        place = int(where * values.numel())
        flip_bit(values, place, bit)
    is_seen = looked.differ()
    odd = [(entry.parameter, entry.why) for entry in looked.find_odd()] if is_seen else None
    if name:
        flip_bit(values, place, bit)
    return victim, name, odd


@pytest.mark.parametrize(
    ("layout", "stage"),
    [
        pytest.param(name, stage, marks=[] if name in OFTEN else pytest.mark.seldom)
        for name in LAYOUTS
        for stage in ("stage1", "stage3")
    ],
)
def test_one_flipped_bit_is_found_and_its_rank_named(layout: str, stage: str, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    trainable = STAGE1 if stage == "stage1" else STAGE3
    ranks = results_of_ranks(flips, world_size, parallel, trainable, tmp_path, TRIALS)
    victims, whys = set(), set()
    for trial in range(TRIALS):
        victim = ranks[0][trial][0]
        _, name, odd = ranks[victim][trial]
        assert odd is not None, (trial, victim, name, "not found")
        assert [found for found, _ in odd] == [name], (trial, victim)
        others = [ranks[rank][trial][2] for rank in range(world_size) if rank != victim]
        assert others == [[]] * (world_size - 1), (trial, victim, name)
        victims.add(victim)
        whys.add(odd[0][1])
    assert victims == set(range(world_size))
    assert whys <= {STRAY_COPY, STRAY_PART, CHANGED}
    assert (CHANGED in whys) == (stage == "stage1")


def clean_steps(parallel: ParallelConfig, tmp_path: Path, checks: int) -> dict[str, Any]:
    """Checks in every step; weights and losses with and without."""
    groups, workload, engine, shards = _built(parallel, STAGE3, tmp_path)
    looked = Replicas(engine, shards)
    found: list[bool] = []

    def check(is_refused: bool) -> None:
        found.append(looked.differ())

    engine.before_update = check
    for number in range(checks):
        looked.note_published()
        _step(engine, workload, groups, number)
    return {"alarms": sum(found), "checks": len(found)}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.seldom) for name in LAYOUTS]
)
def test_clean_steps_alarm_nobody(layout: str, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    ranks = results_of_ranks(clean_steps, world_size, parallel, tmp_path, CLEAN_CHECKS, timeout_s=400.0)
    assert ranks == [{"alarms": 0, "checks": CLEAN_CHECKS}] * world_size


def without_the_last_check(parallel: ParallelConfig, tmp_path: Path) -> dict[str, list[Any]]:
    """Cases that leave less to go by: no earlier check, masters, drift over tp."""
    groups, workload, engine, shards = _built(parallel, STAGE1, tmp_path)
    layout, found = groups.layout, {}
    frozen = next(shard for shard in shards if not shard.parameter.requires_grad and not shard.is_cut)
    trained = next(shard for shard in shards if shard.parameter.requires_grad and not shard.is_cut)

    def look() -> list[Any]:
        fresh = Replicas(engine, shards)
        return [(entry.parameter, entry.why) for entry in fresh.find_odd()] if fresh.differ() else [None]

    def try_all(is_refused: bool) -> None:
        values = frozen.parameter.detach().view(-1)
        if layout.rank == dist.get_world_size() - 1:
            flip_bit(values, 3, 0)
        found["frozen"] = look()
        if layout.rank == dist.get_world_size() - 1:
            flip_bit(values, 3, 0)
        fragment = engine.fragment(trained.parameter)
        owns = fragment is not None and fragment[1] == 0
        master = fragment[0].detach()[:1] if owns else torch.zeros(1)
        before = master.clone()
        if layout.tp_rank == 0:
            master.fill_(7.0)
        found["owns"] = [[owns]]
        found["master"] = look()
        master.copy_(before)
        found["clean"] = look()
        if layout.tp_size > 1 and layout.tp_rank == 0:  # as if owners had drifted apart some updates ago
            trained.parameter.detach().view(-1)[0] = 7.0
            master.fill_(7.0)
        found["drift"] = look()

    engine.before_update = try_all
    _step(engine, workload, groups, 0)
    return {key: [list(entry or ()) for entry in value] for key, value in found.items()} | {
        "names": [frozen.name, trained.name]
    }


def test_less_to_go_by(tmp_path: Path) -> None:
    ranks = results_of_ranks(without_the_last_check, 2, fp32(), tmp_path)
    frozen, trained = ranks[0]["names"]
    assert [rank["frozen"] for rank in ranks] == [[[frozen, UNDECIDED]]] * 2  # a pair: nothing tells which
    assert sorted(rank["owns"] for rank in ranks) == [[[False]], [[True]]]
    assert [rank["master"] for rank in ranks] == [
        [[trained, STRAY_MASTER]] if rank["owns"][0][0] else [] for rank in ranks
    ]
    assert [rank["clean"] for rank in ranks] == [rank["drift"] for rank in ranks] == [[[]]] * 2
    ranks = results_of_ranks(without_the_last_check, 4, fp32(), tmp_path)
    assert [rank["frozen"] for rank in ranks] == [[], [], [], [[frozen, MINORITY]]]
    ranks = results_of_ranks(without_the_last_check, 2, fp32(2, sequence_parallel=True), tmp_path)
    frozen, trained = ranks[0]["names"]
    assert [rank["frozen"] for rank in ranks] == [[[frozen, UNDECIDED]]] * 2
    assert [rank["drift"] for rank in ranks] == [[[trained, UNDECIDED]]] * 2


NUM_STEPS, EVERY, FLIPPED_STEP = 8, 2, 5


def run_with_a_flip(run_dir: Path, parallel: ParallelConfig, every: int, exponent: bool) -> str:
    """A run whose last rank has one bit flipped in a forward pass of step FLIPPED_STEP; how it ended."""
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    recipe = replace(
        tiny_recipe(run_dir, parallel, NUM_STEPS),
        checkpoint=CheckpointConfig(save_every=2, keep_last=9),
        health=HealthConfig(replicas_every=every, hang_timeout_s=0),
    )
    build = run_module.build_engine

    def build_flipped(*arguments: Any) -> Any:
        engine, shards = build(*arguments)
        if dist.get_rank() == dist.get_world_size() - 1:
            _flip_in_forward(engine, shards, exponent)
        return engine, shards

    run_module.build_engine = build_flipped
    try:
        return str(run_module.run(TinyWorkload(STAGE3, parallel), recipe, groups))
    except ReplicasDiffer as error:
        return str(error)


def _flip_in_forward(engine: Any, shards: list[ShardedParameter], exponent: bool) -> None:
    (scheduled,) = engine._scheduled
    forward, calls = scheduled._forward, iter(range(10**6))
    norm = next(shard.parameter for shard in shards if shard.name == "decoder.final_layernorm.weight")

    def flipping(micro_batch: Any) -> Any:
        if next(calls) == 4 * (FLIPPED_STEP - 1):
            if exponent:
                assert bits_of(norm)[0] >> 30 & 1 == 0  # so the value becomes 2^128 times as large
                flip_bit(norm, 0, 30)
            else:
                flip_bit(norm, 0, 22)
        return forward(micro_batch)

    object.__setattr__(scheduled, "_forward", flipping)


@pytest.mark.parametrize("exponent", [False, True], ids=["mantissa", "exponent"])
def test_a_run_ends_before_it_learns_from_a_flip(exponent: bool, tmp_path: Path) -> None:
    """A flipped exponent makes the step's loss no number; the step is refused, and looked into though none is due."""
    every = 100 if exponent else 5
    messages = results_of_ranks(run_with_a_flip, 2, tmp_path, fp32(), every, exponent)
    assert len(set(messages)) == 1
    assert messages[0].startswith("before the update of step 5 ranks hold other values than they should: rank 1 on ")
    assert "decoder.final_layernorm.weight" in messages[0]
    assert "steps 1 to 4 are suspect" in messages[0]
    (path,) = tmp_path.glob("replicas-*.json")
    report = json.loads(path.read_text())
    assert (report["step"], report["equal_after_step"], report["suspect_steps"]) == (5, 0, [1, 4])
    ((told,),) = [report["ranks"]]
    assert (told["rank"], told["parameters"]) == (
        1,
        [{"name": "decoder.final_layernorm.weight", "why": STRAY_COPY}],
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000004"]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    def weights(every: int) -> list[Any]:
        def run() -> dict[str, Any]:
            groups, workload, engine, shards = _built(fp32(), STAGE3, tmp_path)
            looked = Replicas(engine, shards)
            engine.before_update = (lambda is_refused: (looked.differ(), None)[1]) if every else None
            for number in range(3):
                _step(engine, workload, groups, number)
            return {shard.name: shard.parameter.detach().clone() for shard in shards}

        return results_of_ranks(run, 2)

    for looked, plain in zip(weights(1), weights(0), strict=True):
        assert [name for name in plain if not torch.equal(looked[name], plain[name])] == []


def without_signs(values: torch.Tensor, start: int = 0) -> torch.Tensor:
    bits = bits_of(values)
    return digest((bits & torch.iinfo(bits.dtype).max).view(values.dtype), start)


@pytest.mark.parametrize("parallel", [fp32(), ParallelConfig()], ids=["fp32", "bf16"])
def test_a_digest_without_signs_misses_flipped_signs_alone(
    parallel: ParallelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials above can fail: each of them is found by the very bit it flips."""
    monkeypatch.setattr(replicas, "digest", without_signs)
    ranks: list[Any] = results_of_ranks(flips, 2, parallel, STAGE3, tmp_path, TRIALS)
    for trial in range(TRIALS):
        victim = ranks[0][trial][0]
        _, name, odd = ranks[victim][trial]
        other = ranks[1 - victim][trial][2]
        if KINDS[trial % len(KINDS)] == "sign":
            assert odd is other is None, (trial, name)
        else:
            assert ([found for found, _ in odd or []], other) == ([name], []), trial


def test_copies_compared_with_one_another_alone_would_name_the_wrong_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the owners of masters expect tells which of two copies is right."""

    def no_truth(self: Replicas, number: int) -> torch.Tensor:
        return self._held_digest(number) if self._groups.layout.dp_rank == 0 else self._zero()

    monkeypatch.setattr(Replicas, "_told_digest", no_truth)
    ranks: list[Any] = results_of_ranks(flips, 2, fp32(), STAGE3, tmp_path, TRIALS)
    for trial in range(TRIALS):
        victim = ranks[0][trial][0]
        _, name, odd = ranks[victim][trial]
        is_right = [found for found, _ in odd or []] == [name] and ranks[1 - victim][trial][2] == []
        assert is_right == (victim == 1), (trial, name)


def run_checked(run_dir: Path, parallel: ParallelConfig) -> list[str]:
    """Two steps, then two more from the checkpoint, looked at in every one."""
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    found = []
    for last_step in (2, 4):
        recipe = replace(
            tiny_recipe(run_dir, parallel, last_step), health=HealthConfig(replicas_every=1, hang_timeout_s=0)
        )
        found.append(run_module.run(TinyWorkload(STAGE1, parallel), recipe, groups).name)
    return found


@pytest.mark.parametrize(
    "layout", ["dp2_zero1_bf16", "dp2_zero3_bf16", "megatron_dp2_bf16", "megatron_dp2", "pp2_bf16"]
)
def test_a_resumed_run_alarms_nobody(layout: str, tmp_path: Path) -> None:
    """Copies are those of the fp32 weights that a checkpoint brought, from the first step on."""
    world_size, parallel = LAYOUTS[layout]
    assert results_of_ranks(run_checked, world_size, tmp_path, parallel) == [["step-00000002", "step-00000004"]] * 2
