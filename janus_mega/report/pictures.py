"""Pictures inside a page: PNG bytes as data addresses, many small pictures on one sheet.

Shapes: one picture uint8 [side, side] or [3, side, side]; a stack has n in front.
"""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from janus_mega.report.page import Markup


def as_rgb(pictures: np.ndarray) -> np.ndarray:
    """A stack as uint8 [n, side, side, 3], from [n, side, side] or [n, 3, side, side]."""
    if pictures.ndim == 3:
        return np.repeat(pictures[..., None], 3, axis=3)
    return pictures.transpose(0, 2, 3, 1)


def sheet(pictures: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """One picture uint8 [height, width, 3] with the stack in rows of `columns`, white between."""
    stack = as_rgb(pictures)
    rows = -(-len(stack) // columns)
    side = stack.shape[1]
    pitch = side + gap
    canvas = np.full((rows * pitch - gap, columns * pitch - gap, 3), 255, np.uint8)
    for number, picture in enumerate(stack):
        top, left = (number // columns) * pitch, (number % columns) * pitch
        canvas[top : top + side, left : left + side] = picture
    return canvas


def png_bytes(picture: np.ndarray) -> bytes:
    """PNG of uint8 [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def image(picture: np.ndarray, zoom: int = 1, caption: str = "") -> Markup:
    """A picture uint8 [height, width, 3] set `zoom` times as large, with a caption below."""
    address = "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()
    height, width = picture.shape[0] * zoom, picture.shape[1] * zoom
    tag = f'<img src="{address}" width="{width}" height="{height}" alt="{escape(caption)}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Markup(f"<figure>{tag}{below}</figure>")


def answered(pictures: np.ndarray, answer: str, is_right: bool, zoom: int = 3) -> Markup:
    """Pictures of one item and what was answered; wrong answers stand out."""
    tag = image(sheet(pictures, columns=len(pictures)), zoom).html
    kind = "answer" if is_right else "answer wrong"
    return Markup(f'<span class="{kind}">{tag}{escape(answer)}</span>')
