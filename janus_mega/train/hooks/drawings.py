"""Pictures that samples are asked about, drawings on one sheet, and how much of the codebook they use."""

from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode_image

_COLUMNS = 8


def read_picture(path: str) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a question's picture.

    Raises:
        UserError: it is missing or no picture.
    """
    try:
        return decode_image(Path(path).read_bytes())
    except (OSError, ImageError) as error:
        raise UserError(
            f"samples.questions: {path}: {error}; name a picture that can be read, or leave it out"
        ) from error


def code_use(ids: np.ndarray, codebook_size: int) -> tuple[float, float]:
    """Share of the codebook that occurs in some ids, and the entropy of their frequencies in bits."""
    counts = np.bincount(ids.ravel(), minlength=codebook_size)
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / codebook_size, float(-(shares * np.log2(shares)).sum()) + 0.0


def sheet(pictures: np.ndarray) -> np.ndarray:
    """One picture uint8 [height, width, 3] of a stack uint8 [n, 3, side, side], side by side in rows."""
    count, _, side, _ = pictures.shape
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    canvas = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * side, number % columns * side
        canvas[top : top + side, left : left + side] = picture.transpose(1, 2, 0)
    return canvas
