"""Tables that several pages share: heat maps of counts, seconds per phase."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from janus_mega.report.page import Cell, Markup, table


def heat_table(counts: np.ndarray, row_names: Sequence[str], column_names: Sequence[str], caption: str) -> Markup:
    """Counts [rows, columns] with a tint by share of the row; zeros stay blank."""
    head = "<tr><th></th>" + "".join(f"<th>{escape(name)}</th>" for name in column_names) + "</tr>"
    totals = np.maximum(counts.sum(axis=1), 1)
    lines = []
    for name, row, total in zip(row_names, counts, totals, strict=True):
        cells = "".join(_tinted(int(count), count / total) for count in row)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    body = "\n".join([head, *lines])
    return Markup(f'<figure><table class="heat">{body}</table><figcaption>{escape(caption)}</figcaption></figure>')


def _tinted(count: int, share: float) -> str:
    if not count:
        return "<td></td>"
    return f'<td style="background: rgba(31, 111, 235, {0.08 + 0.62 * share:.2f})">{count}</td>'


def seconds_table(seconds: Mapping[str, float]) -> Markup:
    """Phases and the seconds they took, with their sum."""
    rows: list[Sequence[object]] = [(name, Cell(f"{value:.1f}", "number")) for name, value in seconds.items()]
    rows.append(("all phases", Cell(f"{sum(seconds.values()):.1f}", "number")))
    return table(("phase", "seconds"), rows)
