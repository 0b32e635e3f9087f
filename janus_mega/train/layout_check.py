"""Does a layout train as one process does? The run's own model and data, a few deterministic fp32 steps, each layout.

Every layout starts from the same weights and sees the same global batches, among them steps in which one data-parallel
rank has no image to understand and one in which no rank has. Loss and gradient norm must agree: most silent errors of
composed parallelism leave the first loss right and show in the norm.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.plan.open import open_data
from data_pipeline.spec import DataSpec, Task
from data_pipeline.stream.collate import collate
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.text.load import load_text_tokenizer
from janus_mega.config.schema import Module, ParallelConfig, Precision, Recompute, RunConfig
from janus_mega.parallel.forked import run_ranks
from janus_mega.parallel.groups import build_groups
from janus_mega.train.janus import JanusWorkload, recipe_of
from janus_mega.train.run import build_engine

NUM_STEPS = 5
GLOBAL_BATCH_SIZE = 8
PEAK_LR = 1e-3


@dataclass(frozen=True, slots=True)
class CheckedLayout:
    """A layout to compare with one process."""

    name: str
    world_size: int
    tp_size: int = 1
    pp_size: int = 1
    sequence_parallel: bool = False


ONE_PROCESS = CheckedLayout("one process", 1)
LAYOUTS = (
    CheckedLayout("tp 2", 2, tp_size=2),
    CheckedLayout("tp 2 + sequence parallel", 2, tp_size=2, sequence_parallel=True),
    CheckedLayout("pp 2", 2, pp_size=2),
    CheckedLayout("dp 2, ZeRO-1", 2),
    CheckedLayout("tp 2 x pp 2", 4, tp_size=2, pp_size=2),
)


@dataclass(frozen=True, slots=True)
class LayoutFigures:
    """How far a layout is from one process, largest over the steps."""

    stage: str
    layout: str
    max_loss_diff: float
    """Relative difference of the loss."""
    max_norm_diff: float
    """Relative difference of the gradient norm."""
    seconds: float


def check_layouts(
    config: RunConfig,
    stages: Mapping[str, Sequence[Module]],
    work_dir: Path,
    layouts: Sequence[CheckedLayout] = LAYOUTS,
) -> Iterator[LayoutFigures]:
    """Compares layouts with one process, for each set of trainable modules; yields figures as they come.

    Forks ranks, so the calling process must not have run multi-threaded torch operations.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    for stage, trainable in stages.items():
        expected = _steps_of(config, trainable, ONE_PROCESS, work_dir)
        for layout in layouts:
            start = time.perf_counter()
            found = _steps_of(config, trainable, layout, work_dir)
            loss_diff, norm_diff = (
                max(_relative(a[i], b[i]) for a, b in zip(found, expected, strict=True)) for i in range(2)
            )
            yield LayoutFigures(stage, layout.name, loss_diff, norm_diff, time.perf_counter() - start)


def _relative(found: float, expected: float) -> float:
    """Relative difference; infinite for what is not a number, which `max` would pass over."""
    difference = abs(found - expected) / (abs(expected) or 1.0)
    return math.inf if math.isnan(difference) else difference


def _steps_of(
    config: RunConfig, trainable: Sequence[Module], layout: CheckedLayout, work_dir: Path
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step under a layout."""
    config = replace(
        config,
        run_dir=str(work_dir),
        parallel=ParallelConfig(
            tp_size=layout.tp_size,
            pp_size=layout.pp_size,
            sequence_parallel=layout.sequence_parallel,
            precision=Precision.fp32,
            recompute=Recompute.none,
        ),
        optimizer=replace(config.optimizer, lr=PEAK_LR, warmup_steps=0),
        stage=replace(config.stage, trainable=list(trainable), init_from="", global_batch_size=GLOBAL_BATCH_SIZE),
    )
    result = work_dir / "steps.json"
    run_ranks(_train, layout.world_size, config, result)
    return json.loads(result.read_text(encoding="utf-8"))


def _train(config: RunConfig, result: Path) -> None:
    groups = build_groups(
        config.parallel.tp_size, config.parallel.pp_size, config.seed, config.parallel.virtual_pp_size
    )
    workload = _CheckWorkload(config)
    engine, _ = build_engine(workload, recipe_of(config), groups)
    layout = groups.layout
    steps = []
    for batches in workload.batches(layout.dp_rank, layout.dp_size, 0, NUM_STEPS):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        step = engine.train_step([workload.place(batch, groups) for batch in batches], counts, config.optimizer.lr)
        steps.append((step.loss, step.grad_norm))
    if layout.rank == 0:
        result.write_text(json.dumps(steps), encoding="utf-8")


class _CheckWorkload(JanusWorkload):
    """The stage's rows, with some replaced by rows that hold no image to understand."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._rows = RowDataset(self.data)
        tokenizer = load_text_tokenizer(config.data.text_tokenizer)
        blind = open_data(_without_understanding(config.data), tokenizer, global_batch_size=GLOBAL_BATCH_SIZE)
        self._blind_rows = RowDataset(blind)

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Micro-batches of one row. Odd steps: nothing to understand in the second half; the last step: nowhere."""
        share = GLOBAL_BATCH_SIZE // dp_size
        for step in range(first_step, last_step):
            numbers = range(step * GLOBAL_BATCH_SIZE, (step + 1) * GLOBAL_BATCH_SIZE)
            first_blind = 0 if step == last_step - 1 else GLOBAL_BATCH_SIZE // 2 if step % 2 else GLOBAL_BATCH_SIZE
            rows = [
                (self._rows if offset < first_blind else self._blind_rows)[number]
                for offset, number in enumerate(numbers)
            ]
            yield [collate([row]) for row in rows[dp_rank * share : (dp_rank + 1) * share]]


def _without_understanding(spec: DataSpec) -> DataSpec:
    sources = {
        name: replace(source, weight=0.0) if source.task == Task.understanding else source
        for name, source in spec.sources.items()
    }
    return replace(spec, sources=sources)
