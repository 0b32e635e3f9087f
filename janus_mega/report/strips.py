"""A packed row as a strip: what every position holds, whose document it is, and where a loss is. Inline SVG.

Three bands share one axis of positions: tasks above, kinds in the middle, loss below. A strip is as wide as the page
and stretches with it, so it holds rectangles only, and all words are beside it.
"""

from collections.abc import Iterator
from html import escape

from data_pipeline.explain.preview import DocumentView, RowView
from data_pipeline.schema import TokenKind
from janus_mega.report.page import Markup

TASK_COLOURS = {"text": "#5c6773", "understanding": "#1f6feb", "generation": "#8a3ffc"}
KIND_COLOURS = {
    TokenKind.text: "#d6dce3",
    TokenKind.image_und: "#8fbcff",
    TokenKind.image_gen: "#cbaaff",
    TokenKind.pad: "#f7f1e3",
}
LOSS_COLOUR = "#1b7f4b"
HOLE_COLOUR = "#f2a49e"
DROPPED_COLOUR = "#f5c26b"
_HEIGHT = 44
_TASK = (0, 7)
_KIND = (9, 24)
_LOSS = (35, 7)


def row_strip(row: RowView) -> Markup:
    """The strip of one row; hovering over a document tells what it is."""
    parts = [_band(start, stop, _KIND, KIND_COLOURS[kind]) for kind, start, stop in row.kinds]
    for document in row.documents:
        parts += _document(document)
    parts.append(_band(0, row.seq_len, _LOSS, "#eef1f4"))
    parts += [_band(start, stop, _LOSS, LOSS_COLOUR) for start, stop in row.trained]
    # a border is one pixel wide whatever the width of the page
    gap = row.seq_len / 1000
    parts += [
        f'<rect x="{document.stop - gap / 2:.2f}" y="0" width="{gap:.2f}" height="{_HEIGHT}" fill="#fff"/>'
        for document in row.documents
    ]
    parts += [_hover(document) for document in row.documents]
    body = "".join(parts)
    return Markup(
        f'<svg class="strip" viewBox="0 0 {row.seq_len} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="row {row.row}">{body}</svg>'
    )


def _band(start: float, stop: float, band: tuple[int, int], colour: str) -> str:
    return f'<rect x="{start}" y="{band[0]}" width="{stop - start}" height="{band[1]}" fill="{colour}"/>'


def _document(document: DocumentView) -> Iterator[str]:
    """Its task, and what is special about it."""
    yield _band(document.start, document.stop, _TASK, TASK_COLOURS[document.used.task])
    if document.hole:
        yield _band(document.start, document.stop, _KIND, HOLE_COLOUR)
    elif document.used.dropped_prompt:
        yield _band(document.start, document.stop, (_KIND[0] + _KIND[1] - 5, 5), DROPPED_COLOUR)


def _hover(document: DocumentView) -> str:
    """An invisible box over a document that carries its title."""
    used = document.used
    title = f"{used.source}, {used.task}: {used.tokens} tokens, uid {used.uid}, epoch {used.epoch}"
    title += ", prompt dropped" if used.dropped_prompt else ""
    title += f", hole ({document.hole})" if document.hole else ""
    box = f'x="{document.start}" y="0" width="{document.stop - document.start}" height="{_HEIGHT}"'
    return f'<rect class="document" {box} fill="transparent"><title>{escape(title)}</title></rect>'


def legend() -> Markup:
    """What the colours of a strip mean."""
    entries = [
        *((f"{task} task", colour, "top") for task, colour in TASK_COLOURS.items()),
        ("text", KIND_COLOURS[TokenKind.text], "middle"),
        ("image understood", KIND_COLOURS[TokenKind.image_und], "middle"),
        ("image drawn", KIND_COLOURS[TokenKind.image_gen], "middle"),
        ("prompt dropped", DROPPED_COLOUR, "middle"),
        ("hole", HOLE_COLOUR, "middle"),
        ("padding", KIND_COLOURS[TokenKind.pad], "middle"),
        ("bears a loss", LOSS_COLOUR, "bottom"),
    ]
    names = {"top": "top band", "middle": "middle", "bottom": "bottom band"}
    groups = []
    for band, name in names.items():
        chips = "".join(
            f'<span class="key"><i style="background: {colour}"></i>{escape(text)}</span>'
            for text, colour, where in entries
            if where == band
        )
        groups.append(f'<span class="keys"><b>{name}</b>{chips}</span>')
    return Markup(f'<div class="legend">{"".join(groups)}</div>')
