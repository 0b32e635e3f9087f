"""What a picture looks like in 64 bits: hashes of copies differ in few of them, hashes of different pictures in half.

The usual DCT hash: gray, 32 x 32, the 8 x 8 lowest frequencies, each above or below their median. Brightness, contrast,
size and compression leave the signs of low frequencies as they are. A picture without contrast (a blank page, the sky)
has none to speak of: its bits are noise, so such pictures are not compared this way.
"""

from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.explain.picture_header import picture_size
from data_pipeline.images import MAX_PIXELS, ImageError, decode_image, image_extension

_SIDE, _BLOCK = 32, 8
_DECODED_SIDE = 64
"""JPEGs are decoded at a fraction of their size, but not below this."""
_LEAST_CONTRAST = 4.0
"""Standard deviation in gray levels below which a picture is flat."""


def _dct_rows() -> np.ndarray:
    """float32 [8, 32]: the lowest rows of the type-II cosine transform of 32 points."""
    frequency, place = np.mgrid[:_BLOCK, :_SIDE]
    return np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE)).astype(np.float32)


_DCT = _dct_rows()


@dataclass(frozen=True, slots=True)
class PictureHash:
    """Hash of one picture."""

    bits: int
    """64 bits."""
    is_flat: bool
    """Too little contrast to be compared."""


def perceptual_hash(content: bytes) -> PictureHash:
    """Hashes a picture file.

    Raises:
        ImageError: It does not decode, or has too many pixels.
    """
    gray = _small_gray(content)
    block = _DCT @ gray @ _DCT.T  # [8, 8]
    above = (block > np.median(block)).ravel()
    return PictureHash(int.from_bytes(np.packbits(above).tobytes(), "big"), bool(gray.std() < _LEAST_CONTRAST))


def _small_gray(content: bytes) -> np.ndarray:
    """float32 [32, 32]: gray levels 0 to 255."""
    width, height = picture_size(content)
    if width * height > MAX_PIXELS:
        raise ImageError(f"it has {width} x {height} pixels, at most {MAX_PIXELS} are allowed")
    picture: Image.Image | None = None
    if image_extension(content) == "jpg":
        try:
            gray = simplejpeg.decode_jpeg(content, "GRAY", min_height=_DECODED_SIDE, min_width=_DECODED_SIDE)
            picture = Image.fromarray(gray[:, :, 0])
        except ValueError:
            pass  # CMYK and harmless oddities: the full decoder decides
    if picture is None:
        picture = Image.fromarray(decode_image(content)).convert("L")
    return np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float32)
