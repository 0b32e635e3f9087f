"""Does a layout train as one process does? The run's own model or a shrunken one, a few deterministic fp32 steps.

Every layout starts from the same weights and sees the same global batches, among them steps in which one data-parallel
rank has no image to understand and one in which no rank has. Loss, gradient norm, each module's gradient norm and the
weights at the end must agree: most silent errors of composed parallelism leave the first loss right and show in the
norm.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from janus_mega.config import derive
from janus_mega.config.schema import Module, ParallelConfig, Precision, Recompute, RunConfig
from janus_mega.parallel.forked import run_ranks
from janus_mega.parallel.groups import init_distributed
from janus_mega.parallel.platform import device_of_rank
from janus_mega.train.check_rows import RealRowsWorkload, SyntheticWorkload
from janus_mega.train.janus import JanusWorkload
from janus_mega.train.layout_trace import deviations, load_reference, save_reference, trace_steps
from janus_mega.train.shrunk import one_process, shrink

NUM_STEPS = 5
GLOBAL_BATCH_SIZE = 8
PEAK_LR = 1e-3
TIMEOUT_S = 300.0
BARS = {
    "loss": 5e-6,  # measured worst 1.9e-7
    "norm": 1e-5,  # measured worst 3e-7
    "modules": 1e-5,  # measured worst 3e-7
    "weights": 1e-5,  # measured worst 6e-7 shrunk (eight seeds), 6e-6 with the demo's epsilon
}
"""Relative differences that pass."""


@dataclass(frozen=True, slots=True)
class CheckedLayout:
    """A layout to compare with one process."""

    name: str
    world_size: int
    tp_size: int = 1
    pp_size: int = 1
    sequence_parallel: bool = False


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
    max_module_diff: float
    """Of a module's gradient norm."""
    max_weight_diff: float
    """Of a tensor of the weights after the last step."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify_layout` found."""

    layout: str
    world_size: int
    num_steps: int
    seconds: float
    expected: dict[str, Any]
    """Trace of the one process."""
    found: dict[str, Any]
    """Trace of the layout."""
    deviations: dict[str, Any]
    """Fields of `layout_trace.Deviations`."""

    @property
    def worst(self) -> dict[str, tuple[float, str]]:
        """By the keys of BARS: the largest difference and what has it."""
        parts = {"loss": {"": self.deviations["loss"]}, "norm": {"": self.deviations["norm"]}}
        parts |= {key: self.deviations[key] for key in ("modules", "weights")}
        return {key: max((value, name) for name, value in part.items()) for key, part in parts.items()}

    @property
    def passed(self) -> bool:
        """Whether nothing is above its bar."""
        return all(value <= BARS[key] for key, (value, _) in self.worst.items())

    def as_values(self) -> dict[str, Any]:
        """Everything that was compared, as JSON values."""
        worst = {key: {"value": value, "name": name, "bar": BARS[key]} for key, (value, name) in self.worst.items()}
        return {"passed": self.passed, "worst": worst, **asdict(self)}


def verify_layout(
    config: RunConfig, world_size: int, work_dir: Path, *, num_steps: int = NUM_STEPS, real_rows: bool = False
) -> Verdict:
    """Compares a configuration's layout, its model shrunk, with one process, in forked ranks on this machine.

    Args:
        config: one that `validate` accepts.
        world_size: ranks of the layout, a multiple of tp * pp.
        work_dir: receives files that ranks exchange.
        num_steps: optimizer steps; five go through every hard case once.
        real_rows: the run's own rows instead of synthetic ones.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed.
        TimeoutError: ranks hang.
    """
    start = time.perf_counter()
    small = shrink(config, derive.dp_size(config.parallel, world_size), keep_data=real_rows)
    workload = RealRowsWorkload if real_rows else SyntheticWorkload
    found = _compare(workload, small, world_size, num_steps, work_dir)
    return Verdict(describe(config.parallel, world_size), world_size, num_steps, time.perf_counter() - start, **found)


def verify_launched(
    config: RunConfig, work_dir: Path, *, num_steps: int = NUM_STEPS, real_rows: bool = False
) -> Verdict:
    """The same on the ranks that a launcher has started; `work_dir` is a directory that all of them see.

    Rank 0 trains alone before it joins the others. Collective over: world, which must not be joined yet.
    """
    start = time.perf_counter()
    world_size = int(os.environ["WORLD_SIZE"])
    small = shrink(config, derive.dp_size(config.parallel, world_size), keep_data=real_rows)
    workload = RealRowsWorkload if real_rows else SyntheticWorkload
    if int(os.environ["RANK"]) == 0:
        work_dir.mkdir(parents=True, exist_ok=True)
        run_ranks(_record, 1, workload, one_process(small), num_steps, work_dir, timeout_s=TIMEOUT_S)
    init_distributed(TIMEOUT_S)
    found = _measure(workload, small, num_steps, work_dir)
    if dist.get_rank() == 0:
        shutil.rmtree(work_dir)  # all ranks have read: the comparison has reduced over them
    return Verdict(describe(config.parallel, world_size), world_size, num_steps, time.perf_counter() - start, **found)


def describe(parallel: ParallelConfig, world_size: int) -> str:
    """A layout in a line."""
    parts = [f"tp {parallel.tp_size}", f"pp {parallel.pp_size}", f"dp {derive.dp_size(parallel, world_size)}"]
    if parallel.virtual_pp_size > 1:
        parts[1] += f" x {parallel.virtual_pp_size} chunks"
    backend = parallel.backend.value
    options = [backend if backend != "deepspeed" else f"ZeRO-{parallel.zero_stage}"]
    options += ["sequence parallel"] if parallel.sequence_parallel else []
    options += [f"recompute {parallel.recompute.value}"] if parallel.recompute is not Recompute.none else []
    return ", ".join([" x ".join(parts), *options])


def check_layouts(
    config: RunConfig,
    stages: Mapping[str, Sequence[Module]],
    work_dir: Path,
    layouts: Sequence[CheckedLayout] = LAYOUTS,
) -> Iterator[LayoutFigures]:
    """Compares layouts with one process on a run's own model and rows, for each set of trainable modules.

    Forks ranks, so the calling process must not have run multi-threaded torch operations. Yields figures as they come.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    for stage, trainable in stages.items():
        trained = _with_checked_stage(config, trainable, work_dir)
        run_ranks(_record, 1, RealRowsWorkload, one_process(trained), NUM_STEPS, work_dir)
        for layout in layouts:
            start = time.perf_counter()
            laid_out = replace(trained, parallel=_parallel_of(layout))
            run_ranks(_measure, layout.world_size, RealRowsWorkload, laid_out, NUM_STEPS, work_dir)
            worst = _verdict_of(layout, work_dir).worst
            yield LayoutFigures(
                stage,
                layout.name,
                worst["loss"][0],
                worst["norm"][0],
                time.perf_counter() - start,
                worst["modules"][0],
                worst["weights"][0],
            )


def _verdict_of(layout: CheckedLayout, work_dir: Path) -> Verdict:
    return Verdict(layout.name, layout.world_size, NUM_STEPS, 0.0, **_result(work_dir))


def _with_checked_stage(config: RunConfig, trainable: Sequence[Module], work_dir: Path) -> RunConfig:
    return replace(
        config,
        run_dir=str(work_dir),
        optimizer=replace(config.optimizer, lr=PEAK_LR, warmup_steps=0),
        stage=replace(config.stage, trainable=list(trainable), init_from="", global_batch_size=GLOBAL_BATCH_SIZE),
    )


def _parallel_of(layout: CheckedLayout) -> ParallelConfig:
    return ParallelConfig(
        tp_size=layout.tp_size,
        pp_size=layout.pp_size,
        sequence_parallel=layout.sequence_parallel,
        precision=Precision.fp32,
        check_calls=True,
    )


def _compare(
    workload: type[JanusWorkload], config: RunConfig, world_size: int, num_steps: int, work_dir: Path
) -> dict[str, Any]:
    work_dir.mkdir(parents=True, exist_ok=True)
    run_ranks(_record, 1, workload, one_process(config), num_steps, work_dir, timeout_s=TIMEOUT_S)
    run_ranks(_measure, world_size, workload, config, num_steps, work_dir, timeout_s=TIMEOUT_S)
    return _result(work_dir)


_REFERENCE, _RESULT = "one_process.pt", "layout.json"


def _record(workload: type[JanusWorkload], config: RunConfig, num_steps: int, work_dir: Path) -> None:
    """The one process: trains, and leaves what it showed in the work directory."""
    trace, pieces = trace_steps(workload(config), num_steps)
    save_reference(work_dir / _REFERENCE, trace, pieces)


def _measure(workload: type[JanusWorkload], config: RunConfig, num_steps: int, work_dir: Path) -> dict[str, Any]:
    """A rank of the layout: trains and compares; rank 0 leaves the result. Collective over: world."""
    trace, pieces = trace_steps(workload(config), num_steps)
    expected, weights = load_reference(work_dir / _REFERENCE)
    device = device_of_rank(int(os.environ.get("LOCAL_RANK", "0")))
    off = deviations(trace, pieces, expected, weights, device)
    result = {"expected": asdict(expected), "found": asdict(trace), "deviations": asdict(off)}
    if dist.get_rank() == 0:
        (work_dir / _RESULT).write_text(json.dumps(result), encoding="utf-8")
    return result


def _result(work_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work_dir / _RESULT).read_text(encoding="utf-8"))
    return found
