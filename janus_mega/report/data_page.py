"""The page of `data preview`: packed rows as strips with their documents, samples of sources, pictures and their ids.

One file without scripts and addresses. Pictures and texts have budgets: what would make the page too large to open is
left out, and the page says how much.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.explain.preview import DocumentView, Part, Picture, RowView, SampleView
from janus_mega.report.page import Markup, Page, note, table
from janus_mega.report.strips import TASK_COLOURS, legend, row_strip

MAX_PICTURE_BYTES = 7 << 20
"""Of all pictures together, as written into the page."""
MAX_TEXT_CHARS = 1_500_000
_CHARS_PER_DOCUMENT = 6_000
_MAX_SIDE = 176
_SMALL_SIDE = 48
"""Pictures up to this side are enlarged and stored without loss."""

STYLE = """
body { max-width: 76rem; color: #1d2530; background: #fff; }
h1 { letter-spacing: -.01em; } h2 { font-size: 1.2rem; padding-bottom: .25rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.1rem 0 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; min-width: 7rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; font-weight: 650; }
.tile span { color: var(--soft); font-size: .82rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; font-size: .82rem; color: var(--soft);
  margin: .6rem 0 1rem; }
.keys b { font-weight: 600; margin-right: .5rem; color: var(--ink); }
.key { margin-right: .8rem; white-space: nowrap; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .3rem;
  vertical-align: -.1rem; border: 1px solid rgba(0, 0, 0, .12); }
details.packed { border-top: 1px solid var(--line); padding: .55rem 0; }
details.packed > summary { cursor: pointer; list-style-position: outside; margin-left: 1.1rem; }
.rowhead { display: flex; justify-content: space-between; gap: 1rem; margin-bottom: .25rem; font-size: .9rem; }
.rowhead b { font-weight: 650; } .rowhead span { color: var(--soft); font-variant-numeric: tabular-nums; }
svg.strip { display: block; width: 100%; height: 44px; border-radius: 3px; }
svg.strip rect.document:hover { fill: rgba(29, 37, 48, .14); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: .7rem;
  margin: .9rem 0 .4rem; }
.card { border: 1px solid var(--line); border-left: 4px solid var(--task, var(--line)); border-radius: 6px;
  padding: .5rem .75rem .6rem; min-width: 0; background: #fff; }
.card.hole { background: #fdf1f0; }
.card header { display: flex; flex-wrap: wrap; gap: .1rem .6rem; align-items: baseline; font-size: .86rem; }
.card header b { font-weight: 650; } .card header span { color: var(--soft); }
.badge { border-radius: 9px; padding: 0 .5rem; font-size: .76rem; background: var(--tint); color: var(--ink); }
.badge.warn { background: #fdf0d5; color: #7a4b00; } .badge.bad { background: #fadcd9; color: var(--bad); }
.place { margin-top: .4rem; color: var(--soft); font-size: .72rem; font-family: ui-monospace, monospace;
  overflow-wrap: anywhere; }
.content { margin: .45rem 0 .1rem; overflow-wrap: anywhere; white-space: pre-wrap; font-size: .88rem; line-height: 1.5;
  max-height: 21rem; overflow: auto; }
.content mark { background: #dcf3e5; color: inherit; border-radius: 2px; }
.content .special { font-family: ui-monospace, monospace; font-size: .74rem; color: var(--soft);
  background: var(--tint); border-radius: 3px; padding: 0 .25rem; margin: 0 .1rem; }
.content mark.special { background: #bfe6cf; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin: .35rem 0; white-space: normal; }
.pictures figure { margin: 0; } .pictures figcaption { font-size: .72rem; line-height: 1.3; }
.pictures img { display: block; border-radius: 3px; } .missing { display: inline-flex; align-items: center;
  justify-content: center; width: 7rem; height: 4rem; background: var(--tint); color: var(--soft); font-size: .74rem;
  border-radius: 3px; text-align: center; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .12rem .7rem; font-size: .82rem;
  max-width: 40rem; font-variant-numeric: tabular-nums; } .bars span { text-align: right; color: var(--soft); }
.bars i { background: #9db8dd; border-radius: 2px; align-self: center; height: .75rem; }
@media print { details.packed { break-inside: avoid; } }
""".strip()


@dataclass(slots=True)
class Budget:
    """What a page may still hold, and what was left out."""

    picture_bytes: int = MAX_PICTURE_BYTES
    text_chars: int = MAX_TEXT_CHARS
    pictures_left_out: int = 0
    chars_left_out: int = 0

    def picture(self, picture: Picture) -> str:
        """A picture as HTML, or its place."""
        if picture.pixels is None:
            return f'<span class="missing">{escape(picture.label)}</span>'
        address, width, height = _address(picture.pixels)
        if len(address) > self.picture_bytes:
            self.pictures_left_out += 1
            return '<span class="missing">left out: the page is full</span>'
        self.picture_bytes -= len(address)
        tag = f'<img src="{address}" width="{width}" height="{height}" alt="{escape(picture.label)}">'
        return f"<figure>{tag}<figcaption>{escape(picture.label)}</figcaption></figure>"

    def text(self, text: str, room: int) -> tuple[str, int]:
        """As much of a text as fits a document and the page, escaped; returns what room the document has left."""
        size = max(min(len(text), room, self.text_chars), 0)
        self.text_chars -= size
        self.chars_left_out += len(text) - size
        return escape(text[:size]) + (" ..." if size < len(text) else ""), room - size


def _address(pixels: np.ndarray) -> tuple[str, int, int]:
    """Data address of uint8 [3, height, width], and the size it is shown at."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    longest = max(picture.size)
    stream = io.BytesIO()
    if longest <= _SMALL_SIDE:
        picture.save(stream, "png", optimize=True)
        kind, scale = "png", max(1, round(80 / longest))
        width, height = picture.width * scale, picture.height * scale
    else:
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
        picture.save(stream, "jpeg", quality=82)
        kind, (width, height) = "jpeg", picture.size
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", width, height


def content(parts: Sequence[Part], budget: Budget) -> Markup:
    """Texts and pictures of a document in order; neighbouring pictures stand side by side."""
    html: list[str] = []
    pictures: list[str] = []
    behind: list[str] = []  # special tokens between pictures come after them
    room = _CHARS_PER_DOCUMENT
    for part in parts:
        if isinstance(part, Picture):
            pictures.append(budget.picture(part))
            continue
        text, room = budget.text(part.text.replace("｜", "|").replace("▁", "_") if part.is_special else part.text, room)
        tag, name = "mark" if part.is_trained else "span", ' class="special"' if part.is_special else ""
        markup = f"<{tag}{name}>{text}</{tag}>" if name or part.is_trained else text
        if pictures and part.is_special:
            behind.append(markup)
            continue
        html += [*_side_by_side(pictures), *behind, markup]
        pictures, behind = [], []
    html += [*_side_by_side(pictures), *behind]
    return Markup(f'<div class="content">{"".join(html)}</div>')


def _side_by_side(pictures: Sequence[str]) -> list[str]:
    return [f'<div class="pictures">{"".join(pictures)}</div>'] if pictures else []


def _document_card(document: DocumentView, budget: Budget) -> str:
    used = document.used
    facts = [f"{used.tokens:,} tokens", f"epoch {used.epoch}"]
    facts += [f"from token {used.start:,}"] if used.start else []
    badges = ['<span class="badge warn">prompt dropped</span>'] if used.dropped_prompt else []
    badges += [f'<span class="badge">crop {used.variant}</span>'] if used.variant else []
    badges += ['<span class="badge bad">hole</span>'] if document.hole else []
    body = (
        f'<div class="content">{escape(document.hole)}</div>' if document.hole else content(document.parts, budget).html
    )
    return (
        f'<article class="card{" hole" if document.hole else ""}" style="--task: {TASK_COLOURS[used.task]}">'
        f"<header><b>{escape(used.source)}</b><span>{escape(used.task)}</span><span>{', '.join(facts)}</span>"
        f"{''.join(badges)}</header>{body}"
        f'<div class="place">uid {used.uid} &middot; {escape(used.shard)}:{used.offset} key {escape(used.key)}</div>'
        "</article>"
    )


def packed_row(row: RowView, budget: Budget, *, is_open: bool, shows_ranks: bool) -> Markup:
    """A row: its strip, and its documents when it is opened."""
    where = f" &middot; rank {row.dp_rank}, micro-batch {row.micro_batch}" if shows_ranks else ""
    filled = row.seq_len - row.num_padding
    trained = sum(stop - start for start, stop in row.trained)
    documents = f"{len(row.documents)} document{'s' if len(row.documents) != 1 else ''}"
    told = f"{documents}, {filled:,} of {row.seq_len:,} positions, {trained:,} bear a loss"
    cards = "".join(_document_card(document, budget) for document in row.documents)
    return Markup(
        f'<details class="packed"{" open" if is_open else ""}><summary><div class="rowhead"><b>row {row.row}{where}</b>'
        f'<span>{told}</span></div>{row_strip(row).html}</summary><div class="cards">{cards}</div></details>'
    )


def sample_cards(samples: Iterable[SampleView], budget: Budget) -> Markup:
    """Samples of a source side by side."""
    cards = [
        f'<article class="card"><header><b>sample {sample.sample}</b></header>{content(sample.parts, budget).html}'
        f'<div class="place">uid {sample.uid} &middot; {escape(sample.place)}</div></article>'
        for sample in samples
    ]
    return Markup(f'<div class="cards">{"".join(cards)}</div>')


def tiles(values: Iterable[tuple[str, str]]) -> Markup:
    """Large numbers with their names below."""
    parts = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in values
    )
    return Markup(f'<div class="tiles">{parts}</div>')


def histogram(bins: Sequence[tuple[int, int, int]]) -> Markup:
    """(first, last, count) as bars."""
    most = max((count for *_, count in bins), default=1)
    parts = ""
    for first, last, count in bins:
        name = f"{first:,} &ndash; {last:,}" if last > first else f"{first:,}"
        parts += f'<span>{name}</span><i style="width: {100 * count / most:.1f}%"></i><span>{count:,}</span>'
    return Markup(f'<div class="bars">{parts}</div>')


def rows_page(title: str, subtitle: str, rows: Sequence[RowView], *, shows_ranks: bool) -> tuple[Page, Budget]:
    """A page of packed rows with their sums."""
    page, budget = Page(title, subtitle, style=STYLE), Budget()
    documents = [document for row in rows for document in row.documents]
    positions = sum(row.seq_len for row in rows)
    padding = sum(row.num_padding for row in rows)
    trained = sum(stop - start for row in rows for start, stop in row.trained)
    numbers = [
        ("rows", f"{len(rows):,}"),
        ("documents", f"{len(documents):,}"),
        ("positions", f"{positions:,}"),
        ("padding", f"{padding / max(positions, 1):.2%}"),
        ("bear a loss", f"{trained / max(positions, 1):.1%}"),
        ("images understood", f"{sum(document.used.images_understood for document in documents):,}"),
        ("images drawn", f"{sum(document.used.images_drawn for document in documents):,}"),
    ]
    holes = sum(bool(document.hole) for document in documents)
    numbers += [("holes", f"{holes:,}")] if holes else []
    # the row that shows most opens by itself
    best = max(rows, key=_interest, default=None)
    shown = [packed_row(row, budget, is_open=row is best, shows_ranks=shows_ranks) for row in rows]
    page.add("What was packed", tiles(numbers), _source_table(documents))
    hint = "A row opens on a click. In texts, green is what the model is asked to predict."
    page.add("Rows", legend(), note(hint), *shown)
    return page, budget


def _interest(row: RowView) -> tuple[bool, int, int]:
    """Rows with holes first, then those that show most."""
    documents = row.documents
    return any(document.hole for document in documents), len({d.used.source for d in documents}), len(documents)


def _source_table(documents: Sequence[DocumentView]) -> Markup:
    """Documents and tokens of each source in the rows shown."""
    total = sum(document.used.tokens for document in documents)
    lines = []
    for name in sorted({document.used.source for document in documents}):
        mine = [document.used for document in documents if document.used.source == name]
        tokens = sum(used.tokens for used in mine)
        dropped = sum(used.dropped_prompt for used in mine)
        lines.append((name, mine[0].task, len(mine), tokens, f"{tokens / max(total, 1):.1%}", dropped))
    return table(("source", "task", "documents", "tokens", "share", "prompts dropped"), lines)


def add_source(page: Page, budget: Budget, found: dict[str, Any], samples: Sequence[SampleView], title: str) -> None:
    """A section of one source: what it holds, and some of its samples.

    Args:
        page: Grows by the section.
        budget: Of the page.
        found: What `inspect_source` tells.
        samples: Some samples.
        title: Of the section.
    """
    images = found["images"]
    numbers = [
        ("kind", str(found["kind"])),
        ("samples", f"{found['num_samples']:,}"),
        ("text tokens", f"{found['text_tokens']['total']:,}"),
        ("images understood", f"{images['understood']:,}"),
        ("images drawn", f"{images.get('distinct', images['drawn']):,}"),
        ("repeated uids", f"{found['duplicate_uids']:,}"),
        ("left out in prepare", f"{sum(found['rejects'].values()):,}"),
    ]
    page.add(title, tiles(numbers), sample_cards(samples, budget), note("text tokens per sample"),
             histogram(found["text_tokens"]["histogram"]))  # fmt: skip


def budget_note(budget: Budget) -> Markup:
    """What the page leaves out."""
    if not budget.pictures_left_out and not budget.chars_left_out:
        return Markup("")
    return note(
        f"To keep this page small, {budget.pictures_left_out:,} pictures and {budget.chars_left_out:,} characters of "
        "text are left out; show fewer rows to see them."
    )
