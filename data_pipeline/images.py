"""Pictures: check, decode, and the two crops of Janus. Shape letters: H, W pixels.

JPEG goes through simplejpeg, the rest and odd JPEGs through Pillow. The number of pixels is checked from the header
before anything is decoded. Resizing (`resize`) is a bicubic filter that averages when it shrinks, as DeepSeek does it.

* Understanding (DeepSeek's preprocessing): the long side becomes `size`, both sides truncated to whole pixels and at
  least 14, then gray 127 on the shorter sides, picture in the middle.
* Generation (the paper): the short side becomes `size`, the middle of the long side is kept.
"""

import io
import struct
import warnings
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipeline.resize import resize

MAX_PIXELS = 64_000_000
"""Larger pictures are refused from their header."""

BACKGROUND = 127
"""Gray around pictures that are not square."""

_MIN_SIDE = 14
_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class ImageError(ValueError):
    """A picture that cannot be used; the message says why, callers add which file it was."""


def image_extension(content: bytes) -> str:
    """Extension (jpg, png or webp) of a picture by its first bytes.

    Raises:
        ImageError: Another format, or no picture at all.
    """
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise ImageError("it is neither JPEG, PNG nor WebP")


def decode_image(content: bytes) -> np.ndarray:
    """Pixels of a picture, uint8 [H, W, 3] RGB; transparency is dropped, orientation tags are ignored.

    Raises:
        ImageError: Unknown format, too many pixels, or damaged content.
    """
    if image_extension(content) == "jpg":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
            _check_pixels(width, height)
            return simplejpeg.decode_jpeg(content, colorspace="RGB")
        except ImageError:
            raise
        except ValueError:
            pass  # CMYK and harmless oddities: Pillow decides
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that the next line refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=tuple(_FORMATS))
        with picture:
            _check_pixels(*picture.size)
            return np.asarray(picture.convert("RGB"))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise ImageError(f"it does not decode ({error})") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"it has {width} x {height} pixels, at most {MAX_PIXELS} are allowed")
    if width < 1 or height < 1:
        raise ImageError(f"it has {width} x {height} pixels")


def understanding_view(pixels: np.ndarray, size: int) -> np.ndarray:
    """What the understanding encoder sees: uint8 [H, W, 3] -> uint8 [3, size, size]."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    smallest = min(_MIN_SIDE, size)
    new_width = max(int(width / longest * size), smallest)
    new_height = max(int(height / longest * size), smallest)
    resized = resize(pixels, new_width, new_height)
    if (new_width, new_height) == (size, size):
        return resized
    square = np.full((3, size, size), BACKGROUND, np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    square[:, top : top + new_height, left : left + new_width] = resized
    return square


def generation_view(pixels: np.ndarray, size: int) -> np.ndarray:
    """What the image tokenizer encodes: uint8 [H, W, 3] -> uint8 [3, size, size].

    Raises:
        ImageError: So narrow that its enlarged long side is out of all bounds.
    """
    return generation_crops(pixels, size, (None,))[0]


def generation_crops(pixels: np.ndarray, size: int, places: Sequence[float | None]) -> list[np.ndarray]:
    """Several crops of one picture: uint8 [H, W, 3] -> uint8 [3, size, size] each.

    Args:
        pixels: The picture.
        size: Side of the crops; the short side becomes this.
        places: Where along the long side each lies, from 0 (its beginning) to below 1 (its end); None is the middle.

    Raises:
        ImageError: So narrow that its enlarged long side is out of all bounds.
    """
    height, width = pixels.shape[:2]
    shortest = min(height, width)
    new_width = max(round(width / shortest * size), size)
    new_height = max(round(height / shortest * size), size)
    _check_pixels(new_width, new_height)
    resized = resize(pixels, new_width, new_height)
    crops = []
    for place in places:
        top, left = (
            rest // 2 if place is None else int(place * (rest + 1)) for rest in (new_height - size, new_width - size)
        )
        crops.append(np.ascontiguousarray(resized[:, top : top + size, left : left + size]))
    return crops  # [3, size, size] each
