"""Decoding and the two crops."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images import (
    BACKGROUND,
    ImageError,
    decode_image,
    generation_view,
    image_extension,
    understanding_view,
)
from tests.support.raw import picture, picture_bytes


@pytest.mark.parametrize(("kind", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_formats_decode_as_pillow_does(kind, extension):
    content = picture_bytes(picture("red", 40, 24), kind)
    assert image_extension(content) == extension
    decoded = decode_image(content)
    assert decoded.shape == (24, 40, 3) and decoded.dtype == np.uint8
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(decoded.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    stream = io.BytesIO()
    Image.fromarray(picture("green")).convert(mode).save(stream, "jpeg" if mode == "CMYK" else "png")
    assert decode_image(stream.getvalue()).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("damage", ["cut", "head", "empty"])
def test_damaged_pictures_are_refused(kind, damage):
    content = picture_bytes(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    content = {"cut": content[: len(content) // 2], "head": content[:9], "empty": b""}[damage]
    with pytest.raises(ImageError):
        decode_image(content)


def test_other_formats_are_refused():
    stream = io.BytesIO()
    Image.fromarray(picture("red")).save(stream, "gif")
    with pytest.raises(ImageError, match="neither JPEG, PNG nor WebP"):
        decode_image(stream.getvalue())


def bomb_png(width, height):
    """A PNG whose header promises more than any memory holds."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 10_000, 60_000])
def test_bombs_are_refused_from_the_header(side):
    with pytest.raises(ImageError, match=r"pixels"):
        decode_image(bomb_png(side, side))


def test_jpeg_bombs_are_refused_from_the_header():
    content = bytearray(picture_bytes(picture("red"), "jpeg"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageError, match="60000 x 60000 pixels"):
        decode_image(bytes(content))


def test_understanding_view_pads_the_short_side_with_gray():
    wide = understanding_view(picture("red", 40, 20), 16)
    assert wide.shape == (3, 16, 16)
    pillow = np.asarray(Image.fromarray(picture("red", 40, 20)).resize((16, 14), Image.Resampling.BICUBIC))
    # 20 / 40 * 16 = 8 rows, but at least 14
    assert np.array_equal(wide[:, 1:15], pillow.transpose(2, 0, 1))
    assert (wide[:, 0] == BACKGROUND).all() and (wide[:, 15] == BACKGROUND).all()


@pytest.mark.parametrize(("width", "height"), [(500, 333), (333, 500), (1023, 767), (384, 384), (1000, 3)])
def test_understanding_sides_are_truncated_as_deepseek_does(width, height):
    view = understanding_view(picture("white", width, height), 384)
    longest = max(width, height)
    expected_width, expected_height = (max(int(side / longest * 384), 14) for side in (width, height))
    inside = (view != BACKGROUND).any(0)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert (len(columns), len(rows)) == (expected_width, expected_height)
    assert rows[0] == (384 - expected_height) // 2 and columns[0] == (384 - expected_width) // 2


def test_generation_view_keeps_the_middle_of_the_long_side():
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 200
    assert (generation_view(pixels, 16) == 200).all()
    tall = generation_view(pixels.transpose(1, 0, 2), 16)
    assert tall.shape == (3, 16, 16) and (tall == 200).all()
    assert generation_view(picture("red", 33, 17), 16).shape == (3, 16, 16)


def test_a_thread_is_no_picture_to_draw():
    with pytest.raises(ImageError, match="pixels"):
        generation_view(np.zeros((1, 60_000, 3), np.uint8), 384)


def test_pictures_of_the_right_size_are_untouched():
    pixels = picture("blue")
    assert np.array_equal(understanding_view(pixels, 16), pixels.transpose(2, 0, 1))
    assert np.array_equal(generation_view(pixels, 16), pixels.transpose(2, 0, 1))
