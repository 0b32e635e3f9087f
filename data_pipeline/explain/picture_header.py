"""The size of a picture from its first bytes, and whether its last bytes are there: nothing is decoded."""

import struct

import simplejpeg

from data_pipeline.images import ImageError, image_extension

HEAD_BYTES = 1 << 18
"""Enough for the headers of nearly all pictures; JPEGs with long colour profiles need more."""
TAIL_BYTES = 1 << 10


def picture_size(head: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG or WebP picture by its beginning.

    Raises:
        ImageError: Another format, or a header that is cut or damaged.
    """
    extension = image_extension(head)
    try:
        if extension == "jpg":
            height, width, *_ = simplejpeg.decode_jpeg_header(head)
            return width, height
        if extension == "png":
            if head[12:16] != b"IHDR":
                raise ImageError("a PNG that does not begin with its header")
            width, height = struct.unpack(">II", head[16:24])
            return width, height
        return _webp_size(head)
    except (ValueError, struct.error, IndexError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"its header does not decode ({error})") from error


def _webp_size(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ImageError(f"a WebP with an unknown part {kind!r}")


def seems_cut(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a picture of `size` bytes lacks its end: surely for PNG and WebP, possibly for JPEG."""
    extension = image_extension(head)
    if extension == "webp":
        return int.from_bytes(head[4:8], "little") + 8 > size
    return (b"\xff\xd9" if extension == "jpg" else b"IEND") not in tail
