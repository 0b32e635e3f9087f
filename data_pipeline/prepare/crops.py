"""Which crops of a picture are stored, and what made them: a pure function of its uid and the number of the crop.

The first is the middle one, as Janus crops for generation. Others lie anywhere along the long side and, if that is
wanted, may be mirrored.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import PIL
import simplejpeg

from data_pipeline.images import decode_image, generation_crops
from data_pipeline.resize import resizer_version


def crops_of(content: bytes, uid: str, size: int, num_crops: int, flips: bool) -> list[np.ndarray]:
    """The crops of a picture file, see `crop`.

    Raises:
        ImageError: The picture does not decode, or is too narrow.
    """
    return crop(decode_image(content), uid, size, num_crops, flips)


def crop(pixels: np.ndarray, uid: str, size: int, num_crops: int, flips: bool) -> list[np.ndarray]:
    """The crops of a picture, uint8 [H, W, 3] -> uint8 [3, size, size] each; some may be equal: a square has one place.

    Raises:
        ImageError: The picture is too narrow.
    """
    places: list[float | None] = [None]
    mirrored = [False]
    for number in range(1, num_crops):
        digest = hashlib.sha256(f"{uid} crop {number}".encode()).digest()
        places.append(int.from_bytes(digest[:6], "little") / (1 << 48))
        mirrored.append(flips and bool(digest[6] & 1))
    views = generation_crops(pixels, size, places)
    return [view[:, :, ::-1] if mirror else view for view, mirror in zip(views, mirrored, strict=True)]


def distinct(crops: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """The different ones among crops, and for each crop which of those it is."""
    found: list[np.ndarray] = []
    which: list[int] = []
    for crop in crops:
        same = [number for number, other in enumerate(found) if np.array_equal(crop, other)]
        if not same:
            found.append(crop)
        which.append(same[0] if same else len(found) - 1)
    return found, which


def preprocessing(size: int, num_crops: int, flips: bool) -> str:
    """What is done to pictures before they are encoded, with the versions of what does it."""
    others = f", {num_crops - 1} more along it by uid{' (mirrored by uid)' if flips else ''}" if num_crops > 1 else ""
    cropped = f"short side {size}, middle of the long side{others}"
    decoder = f"decoded by simplejpeg {_version(simplejpeg)} or Pillow {PIL.__version__}"
    return f"{cropped}; {resizer_version()}; {decoder}"


def _version(module: object) -> str:
    return str(getattr(module, "__version__", "unknown"))
