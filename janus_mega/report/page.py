"""The shell of a self-contained HTML page: no scripts, no fonts, no addresses; styles and pictures are inside.

Everything that enters as plain text is escaped here; functions that return markup return `Markup`, so that a string
cannot be mistaken for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from data_pipeline.files import write_aside

STYLE = """
:root { --ink: #1d2530; --soft: #5c6773; --line: #d9dee4; --good: #1b7f4b; --bad: #b3261e; --tint: #f5f7f9; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
p.note { color: var(--soft); } code { background: var(--tint); padding: 0 .25em; }
table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .25rem .7rem; text-align: left; }
th { border-bottom: 2px solid var(--line); } td { border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.met { color: var(--good); font-weight: 600; } td.missed { color: var(--bad); font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
figure { margin: .6rem 0; } figcaption { color: var(--soft); font-size: .9em; }
img { image-rendering: pixelated; border: 1px solid var(--line); }
table.heat td, table.heat th { padding: .15rem .45rem; text-align: right; border: 0; font-size: .85em; }
.answer { display: inline-block; margin: 0 .7rem .7rem 0; font-size: .85em; } .answer img { display: block; }
.answer.wrong { color: var(--bad); font-weight: 600; }
""".strip()


@dataclass(frozen=True, slots=True)
class Markup:
    """A piece of finished HTML."""

    html: str

    def __add__(self, other: "Markup") -> "Markup":
        return Markup(self.html + "\n" + other.html)


EMPTY = Markup("")


def text(value: object) -> Markup:
    """Any value as escaped text."""
    return Markup(escape(str(value)))


def note(value: str) -> Markup:
    """A paragraph of explanation."""
    return Markup(f'<p class="note">{escape(value)}</p>')


def row(parts: Iterable[Markup]) -> Markup:
    """Parts side by side, wrapping where the page is narrow."""
    return Markup('<div class="row">' + "\n".join(f"<div>{part.html}</div>" for part in parts) + "</div>")


@dataclass(frozen=True, slots=True)
class Cell:
    """One table cell; `kind` is a class of the style sheet: number, met, missed or empty."""

    value: object
    kind: str = ""


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; cells are `Cell`, `Markup` or plain values (numbers are set right)."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{escape(header)}</th>" for header in headers) + "</tr>"]
    lines += ["<tr>" + "".join(_cell(value) for value in values) + "</tr>" for values in rows]
    return Markup("\n".join([*lines, "</table>"]))


def _cell(value: object) -> str:
    kind = ""
    if isinstance(value, Cell):
        kind, value = value.kind, value.value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        kind = "number"
    html = value.html if isinstance(value, Markup) else escape(show_number(value))
    return f'<td class="{kind}">{html}</td>' if kind else f"<td>{html}</td>"


def show_number(value: object) -> str:
    """Floats with four significant digits (tiny ones as powers of ten), everything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


@dataclass(slots=True)
class Page:
    """A page that grows by sections."""

    title: str
    subtitle: str = ""
    style: str = ""
    """Rules of this page, after those of all pages."""
    sections: list[Markup] = field(default_factory=list)

    def add(self, title: str, *parts: Markup) -> None:
        """Appends a section."""
        body = "\n".join(part.html for part in parts)
        self.sections.append(Markup(f"<section><h2>{escape(title)}</h2>\n{body}</section>"))

    def render(self) -> str:
        """The whole page."""
        body = "\n".join(section.html for section in self.sections)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>\n'
            f'<meta name="viewport" content="width=device-width"><style>\n{STYLE}\n{self.style}\n</style>'
            "</head><body>\n"
            f'<h1>{escape(self.title)}</h1>\n<p class="note">{escape(self.subtitle)}</p>\n{body}\n</body></html>\n'
        )

    def write(self, path: Path) -> None:
        """Writes the page whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, self.render().encode())
