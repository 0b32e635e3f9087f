"""Runs that are stopped and go on, and what tests compare: values of every step, and everything the last one saved.

A run that nothing disturbs also saves halfway, which changes nothing in it. Going on then means: another run directory
that holds only that checkpoint, in new processes. So one undisturbed run is the first half of many others.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from data_pipeline.schema import LabelHead, TokenKind
from data_pipeline.spec import DataSpec
from janus_mega.checkpoint.compare import Comparison, compare
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.config.load import dump
from janus_mega.config.schema import (
    CheckpointConfig,
    HealthConfig,
    LoggingConfig,
    Module,
    OptimizerConfig,
    OptimizerState,
    ParallelConfig,
    RunConfig,
    Schedule,
    StageConfig,
)
from janus_mega.models.placement import PlacedBatch
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.train.janus import JanusWorkload, recipe_of
from janus_mega.train.order import FixedOrder
from janus_mega.train.run import run
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.shards import TinyShards
from tests.support.tiny import STAGE3, VOCAB_SIZE, TinyWorkload, tiny_model

import_what_ranks_need()

STEPS = 4
PLANNED = 6
"""Steps the schedule is made for: rates differ in every step, none is 0."""
ROWS = 8
"""Of a step."""
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Case:
    """How a run is trained."""

    world_size: int
    parallel: ParallelConfig
    ema: float = 0.0
    draws: bool = False
    """Whether ids and labels follow from all random generators, which then must go on where they were."""
    shards: TinyShards | None = None
    """Real rows of a compiled plan; else the hard rows of `tiny`."""
    trainable: tuple[Module, ...] = STAGE3
    init_from: str = ""
    optimizer_state: OptimizerState = OptimizerState.fresh
    last_step: int = STEPS
    max_skips: int = 5
    one_rate: bool = False
    """The same learning rate in every step; else another in each."""
    patch: Callable[[], None] | None = None
    """Called in every rank before anything is built."""


class HashedOrder(FixedOrder):
    """Tells rows apart, as the order of a plan does."""

    def row_digests(self, batches: Sequence[dict[str, Tensor]]) -> list[bytes]:
        return [sha256(row.numpy().tobytes()).digest() for batch in batches for row in batch["input_ids"]]


class DrawingWorkload(TinyWorkload):
    """What a step reads and what it must predict follow from all random generators of the rank.

    Every normal draw makes two numbers and keeps the second for the next draw. A step draws an odd number of times from
    each generator, so after every other step one number waits, which a checkpoint must keep too. Ranks that differ in
    dp or pp draw unlike often, so each has states of its own; tp ranks hold the same ids and so draw the same.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._placed = 0

    def place(self, batch: dict[str, Tensor], groups: ProcessGroups) -> PlacedBatch:
        layout = groups.layout
        in_a_step = ROWS // layout.dp_size // self.parallel.micro_batch_size
        is_first = self._placed % in_a_step == 0
        self._placed += 1
        more = (in_a_step + 1) % 2 + 2 * (layout.dp_rank + layout.dp_size * layout.pp_rank) if is_first else 0
        drawn = [number for _ in range(1 + more) for number in normal_of_each_generator()]
        seed = int.from_bytes(sha256(np.array(drawn).tobytes()).digest()[:7], "little")
        shifts = torch.randint(0, VOCAB_SIZE, batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
        # The first stage of a pipeline reads ids, the last one labels, and each shifts by its own generators.
        changed = dict(batch)
        for name, kind, text in (
            ("input_ids", batch["token_kind"], TokenKind.text),
            ("labels", batch["label_head"], LabelHead.text),
        ):
            changed[name] = torch.where(kind == text, (batch[name] + shifts) % VOCAB_SIZE, batch[name])
        return super().place(changed, groups)


def normal_of_each_generator() -> list[float]:
    """One draw each of all that are the same over tp; the one that is not is moved on, which its saved state shows."""
    tracker = get_cuda_rng_tracker()
    with tracker.fork("model-parallel-rng"):
        torch.randn(())
    with tracker.fork("data-parallel-rng"):
        tracked = torch.randn(()).item()
    return [tracked, torch.randn(()).item(), random.gauss(0, 1), np.random.normal()]  # noqa: NPY002


def undisturbed(run_dir: Path, case: Case, stop: int) -> Path:
    """Trains to the end, and saves at step `stop` on the way."""
    _run(run_dir, case, save_every=stop)
    return run_dir


def resumed(run_dir: Path, source: Path, stop: int, case: Case) -> Path:
    """Goes on in some layout from the checkpoint that another run saved at step `stop`."""
    step = f"step-{stop:08d}"
    copytree(source / CHECKPOINTS / step, run_dir / CHECKPOINTS / step)
    _run(run_dir, case, save_every=0)
    return run_dir


def _run(run_dir: Path, case: Case, save_every: int) -> None:
    results_of_ranks(_train, case.world_size, run_dir, case, save_every)


def _train(run_dir: Path, case: Case, save_every: int) -> str:
    if case.patch:
        case.patch()
    parallel = case.parallel
    groups = build_groups(parallel.tp_size, parallel.pp_size, 5, parallel.virtual_pp_size)
    config = config_of(run_dir, case, save_every)
    if case.shards is not None:
        return str(run(JanusWorkload(config), recipe_of(config), groups))
    workload = (DrawingWorkload if case.draws else TinyWorkload)(case.trainable, parallel)
    workload.order, workload.config_text = HashedOrder("tiny"), dump(config)
    recipe = replace(recipe_of(config), name="tiny")
    return str(run(workload, recipe, groups))


def config_of(run_dir: Path, case: Case, save_every: int) -> RunConfig:
    """The whole configuration of a case."""
    model = tiny_model()
    if case.shards is not None:
        codebook_size = case.shards.spec.geometry.codebook_size
        backbone, tokenizer = model.backbone, model.image_tokenizer
        model = replace(
            model,
            backbone=replace(backbone, vocab_size=512),
            image_tokenizer=replace(tokenizer, codebook_size=codebook_size),
        )
    config = RunConfig(
        name="janus",
        run_dir=str(run_dir),
        seed=5,
        model=model,
        parallel=case.parallel,
        optimizer=OptimizerConfig(
            lr=1e-3,
            weight_decay=0.1,
            clip_grad_norm=0.1,
            schedule=Schedule.constant if case.one_rate else Schedule.cosine,
            warmup_steps=0 if case.one_rate else 2,
            ema_decay=case.ema,
        ),
        stage=StageConfig(
            name="stage3",
            trainable=list(case.trainable),
            num_steps=PLANNED,
            stop_at_step=case.last_step,
            global_batch_size=ROWS,
            init_from=case.init_from,
            optimizer_state=case.optimizer_state,
        ),
        logging=LoggingConfig(log_every=1, tensorboard=False),
        checkpoint=CheckpointConfig(save_every=save_every, keep_last=STEPS + 2),
        health=HealthConfig(max_skips_in_a_row=case.max_skips),
    )
    return replace(config, data=case.shards.spec if case.shards else DataSpec(text_tokenizer="none"))


def saved(run_dir: Path, step: int = STEPS) -> CheckpointReader:
    """The checkpoint of a step."""
    return open_checkpoint(run_dir / CHECKPOINTS / f"step-{step:08d}")


def difference_of(run_dir: Path, other: Path) -> Comparison:
    """What the last checkpoints of two runs have different: weights, moments, averages, generators, state."""
    return compare(saved(run_dir), saved(other))


COMPARED = ("loss", "grad_norm", "lr", "amount/", "source_tokens/", "total/", "batch_hash")


def told(run_dir: Path, after: int = 0) -> dict[int, dict[str, Any]]:
    """What a run logged of each step but wall time and memory: losses, norm, rates, totals, the hash of its rows."""
    found: dict[int, dict[str, Any]] = {}
    for file in ("metrics.jsonl", "batches.jsonl"):
        for line in (run_dir / file).read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            kept = {name: values[name] for name in values if name.startswith(COMPARED) and name != "total/seconds"}
            found.setdefault(values["step"], {}).update(kept)
    return {step: values for step, values in found.items() if step > after}
