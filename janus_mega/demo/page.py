"""The demo's report page, made from figures, records and pictures that the run left behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from janus_mega.demo.digits import DIGIT_WORDS
from janus_mega.demo.targets import Verdict
from janus_mega.report.charts import Series, line_chart
from janus_mega.report.page import EMPTY, Cell, Markup, Page, note, row, show_number, table
from janus_mega.report.pictures import answered, image, sheet
from janus_mega.report.tables import heat_table, seconds_table

DRAWN_PER_CLASS = 12
"""Columns of the sheet of drawings."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One judged question with its pictures uint8 [k, side, side]."""

    pictures: np.ndarray
    answer: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class PartRow:
    """Which stages train a part of the model."""

    name: str
    parameters: int
    start: str
    """How its weights begin, in words."""
    stages: tuple[str, ...]


@dataclass(slots=True)
class PageContent:
    """All that the page shows."""

    verdicts: Sequence[Verdict]
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Run name -> lines of its metrics.jsonl."""
    drawings: np.ndarray | None = None
    """uint8 [n, side, side] or [n, 3, side, side]."""
    asked: np.ndarray | None = None
    """Digit asked for, int64 [n]."""
    reconstructions: tuple[np.ndarray, np.ndarray] | None = None
    """Held-out pictures and what the image tokenizer makes of them."""
    answers: Mapping[str, Sequence[Answered]] = field(default_factory=dict)
    """Heading -> items."""
    confusions: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Caption -> counts [10, 11]."""
    guidance: Sequence[Mapping[str, float]] = ()
    """Guidance scales tried on training digits, with their scores."""
    layouts: Sequence[Mapping[str, Any]] = ()
    """Rows of the layout check."""
    parts: Sequence[PartRow] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further figures by name."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    """One sentence on what kind of run this was."""


def build_page(content: PageContent) -> Page:
    """The whole page."""
    met = sum(verdict.is_met for verdict in content.verdicts)
    page = Page("Digits: a Janus trained end to end", content.settings)
    page.add("Results against targets", note(f"{met} of {len(content.verdicts)} targets met."), _verdicts(content))
    page.add("Curves", row(_curves(content.curves)))
    page.add("Drawn digits", _drawings(content), _guidance(content))
    page.add("Held-out pictures with answers", *_answers(content.answers))
    page.add("Confusion", row(_confusions(content.confusions)))
    page.add("Image tokenizer", _reconstructions(content))
    page.add("What starts from scratch, and which stage trains it", _parts(content.parts))
    page.add("Layout check", _records(content.layouts, "The layout check did not run."))
    page.add("Further figures", table(("figure", "value"), list(content.details.items())))
    page.add("Time and versions", row((seconds_table(content.seconds), _versions(content.versions))))
    return page


def _verdicts(content: PageContent) -> Markup:
    rows = []
    for verdict in content.verdicts:
        target = verdict.target
        bound = show_number(verdict.bound) if verdict.bound is not None else "?"
        against = f"{target.rule} {bound}" + (f" ({target.bound})" if isinstance(target.bound, str) else "")
        state = Cell("met", "met") if verdict.is_met else Cell("missed", "missed")
        value: object = "not measured" if verdict.value is None else verdict.value
        rows.append((target.title, Markup(f"<code>{target.key}</code>"), value, against, state))
    return table(("figure", "key", "reached", "target", ""), rows)


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Markup]:
    """Losses of every run, with its stages in order on one axis where names of losses are shared."""
    charts = []
    for name, lines in curves.items():
        losses = sorted({key for line in lines for key in line if key.startswith("loss/")})
        series = [Series(key.removeprefix("loss/"), _points(lines, key)) for key in losses]
        charts.append(line_chart(f"{name}: loss", series or [Series("loss", _points(lines, "loss"))]))
        charts.append(line_chart(f"{name}: gradient norm", [Series("norm", _points(lines, "grad_norm"))]))
    return [chart for chart in charts if chart is not EMPTY]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]


def _drawings(content: PageContent) -> Markup:
    if content.drawings is None or content.asked is None:
        return note("Nothing was drawn.")
    rows = [content.drawings[content.asked == digit][:DRAWN_PER_CLASS] for digit in range(len(DIGIT_WORDS))]
    columns = min(len(part) for part in rows)
    if not columns:
        return note("Some digits were not drawn.")
    pictures = np.concatenate([part[:columns] for part in rows])
    caption = "One row a digit, zero to nine; drawings in order, not chosen."
    return image(sheet(pictures, columns), 2, caption)


def _guidance(content: PageContent) -> Markup:
    if not content.guidance:
        return EMPTY
    return note("The guidance scale was chosen on training digits:") + _records(content.guidance, "")


def _answers(answers: Mapping[str, Sequence[Answered]]) -> list[Markup]:
    parts = []
    for heading, items in answers.items():
        shown = "".join(answered(item.pictures, item.answer, item.is_right).html for item in items)
        parts.append(note(heading) + Markup(f"<div>{shown}</div>"))
    return parts


def _confusions(confusions: Mapping[str, np.ndarray]) -> list[Markup]:
    digits = [str(digit) for digit in range(len(DIGIT_WORDS))]
    return [
        heat_table(counts, digits, [*digits, "other"][: counts.shape[1]], caption)
        for caption, counts in confusions.items()
    ]


def _reconstructions(content: PageContent) -> Markup:
    if content.reconstructions is None:
        return EMPTY
    pictures, remade = content.reconstructions
    stack = np.concatenate([pictures, remade])
    return image(sheet(stack, len(pictures)), 2, "Held-out digits above, what the image tokenizer makes of them below.")


def _parts(parts: Sequence[PartRow]) -> Markup:
    rows = [(part.name, part.parameters, part.start, ", ".join(part.stages) or "frozen") for part in parts]
    return table(("part", "parameters", "starts from", "trained in"), rows)


def _records(records: Sequence[Mapping[str, Any]], otherwise: str) -> Markup:
    """A table whose columns are the records' keys."""
    if not records:
        return note(otherwise)
    headers = list(dict.fromkeys(key for record in records for key in record))
    return table(headers, [[record.get(key, "") for key in headers] for record in records])


def _versions(versions: Mapping[str, str]) -> Markup:
    return table(("package", "version"), list(versions.items()))
