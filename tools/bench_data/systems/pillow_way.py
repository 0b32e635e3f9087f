"""Decoding and resizing as loaders document it: Pillow and its bicubic filter, in the geometry that all are held to."""

import io

import numpy as np
from PIL import Image

SIZE = 384
"""Side of the picture that comes out, pixels."""
_GRAY = 127


def square(image: Image.Image) -> np.ndarray:
    """uint8 [384, 384, 3]: the long side becomes 384, gray fills the rest."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    width, height = image.size
    longest = max(width, height)
    resized = image.resize((width * SIZE // longest, height * SIZE // longest), Image.Resampling.BICUBIC)
    if resized.size == (SIZE, SIZE):
        return np.asarray(resized)
    canvas = Image.new("RGB", (SIZE, SIZE), (_GRAY, _GRAY, _GRAY))
    canvas.paste(resized, ((SIZE - resized.width) // 2, (SIZE - resized.height) // 2))
    return np.asarray(canvas)


def square_of_bytes(content: bytes) -> np.ndarray:
    """The same from the bytes of a file."""
    return square(Image.open(io.BytesIO(content)))


def square_of_pixels(pixels: np.ndarray) -> np.ndarray:
    """The same from decoded pixels, uint8 [H, W, 3]."""
    return square(Image.fromarray(pixels))


def our_square(content: bytes) -> np.ndarray:
    """uint8 [3, 384, 384] from the bytes of a file by the project's own functions."""
    from data_pipeline.images import decode_image, understanding_view

    return understanding_view(decode_image(content), SIZE)
