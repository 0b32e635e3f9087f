"""The main job: real handwriting to a trained, judged and exported Janus in one call.

Phases follow each other; every heavy one runs in forked ranks after a single import of the libraries, so a stage
border is a process border and this process itself never computes with torch. Only the first of the imports below are
cheap: the rest are made by `_import_libraries`, timed as a phase like any other.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from janus_mega.observe.memory import PeakMemory

if TYPE_CHECKING:
    from rich.table import Table

    from janus_mega.config.schema import RunConfig
    from janus_mega.demo.outcome import Outcome
    from janus_mega.demo.phases import Phases
    from janus_mega.demo.workspace import Workspace

RANKS = 2
"""Ranks of training and of the other heavy phases; fixed, so that figures do not depend on the machine."""
NUM_PHASES = 11
"""Imports, raw data, two tokenizers, shards, three stages, judges, export, layout check."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the command tells at its end."""

    table: "Table"
    report_html: Path
    num_missed: int


def run_demo(run_dir: Path, *, short: bool = False, seed: int = 0) -> DemoResult:
    """Runs the whole demo in `run_dir`, replacing an earlier demo there.

    Args:
        run_dir: directory of the run.
        short: a few steps and samples that only show that every part works; targets are reported all the same.
        seed: of splits of pairs, documents and questions.

    Raises:
        UserError: scikit-learn is missing, or `run_dir` holds something else.
    """
    start_s = time.monotonic()
    with PeakMemory() as memory:
        _import_libraries()
        from janus_mega.demo.outcome import Outcome, verdict_table, write_report
        from janus_mega.demo.phases import Phases
        from janus_mega.demo.workspace import open_workspace

        workspace = open_workspace(run_dir)
        outcome, phases = Outcome(is_short=short), Phases(NUM_PHASES)
        phases.seconds["imports"] = time.monotonic() - start_s
        stages, checkpoint = _make(workspace, phases, outcome, seed)
        _judge(workspace, phases, outcome, checkpoint, seed)
        _check_layouts(workspace, phases, outcome, stages)
    outcome.seconds = phases.seconds
    apart_s = phases.seconds["layout check"]
    outcome.figures["seconds_total"] = time.monotonic() - start_s - apart_s
    outcome.figures["peak_pss_gib"] = memory.peak_bytes / 2**30 if memory.peak_bytes else None
    verdicts = write_report(workspace, outcome, stages, checkpoint)
    missed = sum(not verdict.is_met for verdict in verdicts)
    return DemoResult(verdict_table(verdicts), workspace.root / "report.html", missed)


def _import_libraries() -> None:
    """Imports once what all forked ranks use, and keeps this process to one thread and to the CPU.

    Raises:
        UserError: scikit-learn is missing.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # DeepSpeed starts CUDA when it is imported
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError("the demo needs scikit-learn, whose digits it trains on; install janus-mega[demo]") from error
    import torch

    torch.set_num_threads(1)
    import janus_mega.demo.examine
    import janus_mega.demo.exporting
    import janus_mega.demo.making
    import janus_mega.demo.outcome
    import janus_mega.train.layout_check  # noqa: F401


def _make(
    workspace: "Workspace", phases: "Phases", outcome: "Outcome", seed: int
) -> tuple[dict[str, "RunConfig"], str]:
    """Data, tokenizers, shards and the three stages; returns the stages' configurations and the last checkpoint."""
    from janus_mega.demo import making
    from janus_mega.demo.digits import RecordCounts
    from janus_mega.demo.workspace import STAGES, image_tokenizer_config, stage_config

    short = outcome.is_short
    counts = RecordCounts(pairs=400, differences=400) if short else RecordCounts()
    first = stage_config(workspace, STAGES[0], short)
    side, vocab_size = first.data.geometry.understanding_size, first.model.backbone.vocab_size
    phases.run("raw data", 1, making.make_raw, workspace, side, counts, seed)
    phases.run("text tokenizer", 1, making.make_text_tokenizer, workspace, vocab_size)
    phases.run("image tokenizer", RANKS, making.make_image_tokenizer, image_tokenizer_config(workspace, short))
    sizes = phases.run("shards", RANKS, making.make_shards, workspace, first)
    outcome.figures["shards"] = {name: size["samples"] for part in sizes for name, size in part.items()}
    stages, checkpoint, paddings = {}, "", []
    for stage in STAGES:
        stages[stage] = stage_config(workspace, stage, short, init_from=checkpoint)
        told = phases.run(stage, RANKS, making.make_stage, stages[stage])[0]
        checkpoint = told["checkpoint"]
        paddings.append(told["padding_fraction"])
        outcome.figures[f"{stage}_epochs"] = told["epochs"]
    outcome.figures["padding_fraction"] = max(paddings)
    return stages, checkpoint


def _judge(workspace: "Workspace", phases: "Phases", outcome: "Outcome", checkpoint: str, seed: int) -> None:
    """Judged drawings, answers and texts; the export and its verification."""
    from janus_mega.demo.examine import ExamSizes, examine
    from janus_mega.demo.exporting import export_and_verify
    from janus_mega.demo.raw import read_raw

    sizes = ExamSizes(seed=seed)
    if outcome.is_short:
        sizes = ExamSizes(drawings=100, drawings_per_scale=20, repeats=1, seed=seed)
    raw = read_raw(workspace.raw)
    figures: dict[str, Any] = {}
    for part in phases.run("judges", RANKS, examine, workspace, checkpoint, raw, sizes):
        figures |= part
    for part in phases.run("export", 1, export_and_verify, workspace, checkpoint, raw):
        figures |= part
    outcome.figures |= figures


def _check_layouts(
    workspace: "Workspace", phases: "Phases", outcome: "Outcome", stages: dict[str, "RunConfig"]
) -> None:
    """Layouts against one process, on the run's own data, with what stages I and III train."""
    from janus_mega.demo.workspace import STAGES
    from janus_mega.observe.progress import Progress
    from janus_mega.train.layout_check import LAYOUTS, check_layouts

    last = stages[STAGES[-1]]
    names = STAGES[-1:] if outcome.is_short else (STAGES[0], STAGES[-1])
    checked = {name: stages[name].stage.trainable for name in names}
    with phases.timed("layout check"), Progress("layout check", len(checked) * len(LAYOUTS)) as bar:
        for found in check_layouts(last, checked, workspace.root / "layout_check"):
            outcome.layouts.append(asdict(found))
            bar.advance(note=f"{found.stage}, {found.layout}")
    outcome.figures["layout_max_loss_diff"] = max(found["max_loss_diff"] for found in outcome.layouts)
    outcome.figures["layout_max_norm_diff"] = max(found["max_norm_diff"] for found in outcome.layouts)
