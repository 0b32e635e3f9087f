"""What a demo run leaves to read: report.json, report.html and the table for the terminal."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from data_pipeline.files import write_aside
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.config.schema import Module, RunConfig
from janus_mega.demo.page import Answered, PageContent, PartRow, build_page
from janus_mega.demo.targets import Verdict, judge_figures
from janus_mega.demo.workspace import STAGES, Workspace
from janus_mega.evaluate.records import read_records
from janus_mega.models.count import image_tokenizer_parameters
from janus_mega.models.janus import MODULE_ATTRIBUTES
from janus_mega.observe.sinks import read_metrics
from janus_mega.report.page import show_number

PACKAGES = ("janus-mega", "torch", "deepspeed", "megatron-core", "transformers", "webdataset", "sentencepiece", "numpy")
"""Whose versions are reported."""
HEADINGS = {
    "questions": "Questions on a held-out picture (wrong answers first, in red)",
    "pairs": "Two held-out pictures, read in order (wrong answers first)",
    "differences": "The left held-out picture minus the right one (wrong answers first)",
}
CONFUSIONS = {
    "und_confusion": "Held-out digits (rows) and what the model answers",
    "gen_confusion": "Digits asked for (rows) and what the judge reads in the drawings",
}
_NOT_DETAILS = ("guidance_trials", *CONFUSIONS)


@dataclass(slots=True)
class Outcome:
    """All that a run found out."""

    figures: dict[str, Any] = field(default_factory=dict)
    layouts: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    is_short: bool = False


def versions() -> dict[str, str]:
    """Versions of what matters, and the machine in words."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    found["machine"] = f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"
    return found


def part_rows(stages: Mapping[str, RunConfig], checkpoint: CheckpointReader) -> list[PartRow]:
    """Each part of the model, how it starts and which stages train it."""
    rows = []
    for module in Module:
        prefix = f"{MODULE_ATTRIBUTES[module]}."
        names = [name for name in checkpoint.weight_names if name.startswith(prefix)]
        count = sum(int(np.prod(checkpoint.shape(name))) for name in names)
        trained = tuple(name for name, config in stages.items() if module in config.stage.trainable)
        rows.append(PartRow(module.value.replace("_", " "), count, "scratch", trained))
    return rows


def write_report(
    workspace: Workspace, outcome: Outcome, stages: Mapping[str, RunConfig], checkpoint: str
) -> list[Verdict]:
    """Writes report.json and report.html; returns how every target stands."""
    verdicts = judge_figures(outcome.figures)
    content = {
        **outcome.figures,
        "short": outcome.is_short,
        "targets": [
            {"key": v.target.key, "rule": v.target.rule, "bound": v.bound, "reached": v.value, "met": v.is_met}
            for v in verdicts
        ],
        "layouts": outcome.layouts,
        "seconds": {name: round(seconds, 2) for name, seconds in outcome.seconds.items()},
        "versions": versions(),
    }
    write_aside(workspace.root / "report.json", (json.dumps(content, indent=1) + "\n").encode())
    page = page_content(workspace, outcome, verdicts)
    image_tokenizer_size = sum(image_tokenizer_parameters(stages[STAGES[-1]].model.image_tokenizer).values())
    page.parts = [
        *part_rows(stages, open_checkpoint(Path(checkpoint), verify=False)),
        PartRow("image tokenizer (VQ)", image_tokenizer_size, "scratch", ("before stage1, then frozen",)),
    ]
    build_page(page).write(workspace.root / "report.html")
    return verdicts


def page_content(workspace: Workspace, outcome: Outcome, verdicts: Sequence[Verdict]) -> PageContent:
    """Gathers what the phases left in the workspace."""
    shown = np.load(workspace.items / "shown.npz", allow_pickle=False)
    remade = np.load(workspace.items / "remade.npz", allow_pickle=False)
    drawn = list(read_records(workspace.drawings / "drawings.jsonl"))
    drawings = [np.asarray(Image.open(workspace.drawings / record["file"])).transpose(2, 0, 1) for record in drawn]
    figures = outcome.figures
    steps = "a short run that only shows that every part works" if outcome.is_short else "the full run"
    return PageContent(
        verdicts=verdicts,
        curves={
            "image tokenizer": read_metrics(workspace.image_tokenizer_run),
            **{stage: read_metrics(workspace.stage(stage)) for stage in STAGES},
        },
        drawings=np.stack(drawings),
        asked=np.array([record["asked"] for record in drawn]),
        reconstructions=(remade["pictures"], remade["remade"][:, 0]),
        answers={heading: _answered(workspace, shown, name) for name, heading in HEADINGS.items()},
        confusions={caption: np.array(figures[key]) for key, caption in CONFUSIONS.items() if key in figures},
        guidance=figures.get("guidance_trials", ()),
        layouts=outcome.layouts,
        details={key: _short(value) for key, value in figures.items() if key not in _NOT_DETAILS},
        seconds=outcome.seconds,
        versions=versions(),
        settings=f"Real handwriting, real engines, {steps}. Nothing here is pretrained: no picture encoder and no "
        "language model were at hand, so every part starts from scratch.",
    )


def _answered(workspace: Workspace, shown: Any, name: str) -> list[Answered]:
    records = read_records(workspace.items / f"shown_{name}.jsonl")
    return [
        Answered(
            pictures,
            record["answered"] if record["is_right"] else f"{record['answered'] or 'nothing'}, not {record['wanted']}",
            record["is_right"],
        )
        for pictures, record in zip(shown[name], records, strict=True)
    ]


def _short(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{key} {show_number(item)}" for key, item in value.items())
    return value


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The results against targets, for the terminal."""
    table = Table(title="Digits: results against targets")
    for header in ("figure", "reached", "target", ""):
        table.add_column(header)
    for verdict in verdicts:
        bound = "?" if verdict.bound is None else show_number(verdict.bound)
        reached = "not measured" if verdict.value is None else show_number(verdict.value)
        state = "[green]met[/green]" if verdict.is_met else "[red]missed[/red]"
        table.add_row(verdict.target.key, reached, f"{verdict.target.rule} {bound}", state)
    return table
