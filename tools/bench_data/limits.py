"""What this machine can do at best: the bars that loaders are held against, measured in one process on one core."""

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench_data.clock import Stopwatch

_READ_BYTES = 1 << 20
_MIN_BYTES = 256 << 20
"""The tars are gone through again until this much has been read."""


def measure(root: Path, photos: list[Path]) -> dict[str, Any]:
    """GB/s of reading, crc32 and sha256 over the tars below `root`; pictures per second of each directory of photos."""
    tars = sorted(root.rglob("*.tar"))
    size = sum(tar.stat().st_size for tar in tars)
    rounds = max(1, min(20, _MIN_BYTES // size))
    rates = {}
    for name, consume in (("read", len), ("read + crc32", zlib.crc32), ("read + sha256", hashlib.sha256)):
        watch = Stopwatch()
        for _ in range(rounds):
            _go_through(tars, consume)
        rates[name] = rounds * size / watch.read()["cpu_s"] / 1e9
    return {"GB/s": rates, "pictures/s": {place.name: _pictures(place) for place in photos}}


def _go_through(tars: list[Path], consume: Callable[[bytes], Any]) -> None:
    for tar in tars:
        with tar.open("rb", buffering=0) as stream:
            while block := stream.read(_READ_BYTES):
                consume(block)


def _pictures(place: Path) -> dict[str, float]:
    """Pictures per second of decoding alone and of decoding and resizing, from bytes in memory."""
    import simplejpeg
    from PIL import Image

    from tools.bench_data.systems.pillow_way import our_square, square_of_bytes

    ways: dict[str, Callable[[bytes], Any]] = {
        "simplejpeg, decode": lambda content: simplejpeg.decode_jpeg(content, colorspace="RGB"),
        "Pillow, decode": lambda content: Image.open(io.BytesIO(content)).convert("RGB"),
        "Pillow, decode + bicubic to 384": square_of_bytes,
        "ours, decode + resize to 384": our_square,
    }
    contents = [path.read_bytes() for path in sorted(place.glob("*.jpg"))]
    rates = {}
    for name, way in ways.items():
        way(contents[0])
        watch = Stopwatch()
        for content in contents:
            way(content)
        rates[name] = len(contents) / watch.read()["cpu_s"]
    return rates
