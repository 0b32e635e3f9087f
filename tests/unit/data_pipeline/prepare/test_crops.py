"""Which crops of a picture are stored: the middle first, the rest by uid alone."""

import numpy as np
import pytest

from data_pipeline.images import generation_view
from data_pipeline.prepare.crops import crop, crops_of, distinct, preprocessing
from tests.support.raw import picture_bytes


def ramp(width, height):
    """uint8 [height, width, 3]: every column (of a wide picture) or row (of a high one) has its own grey."""
    along = np.arange(max(width, height), dtype=np.uint8)
    wide = np.repeat(np.repeat(along[None, :, None], min(width, height), 0), 3, 2)
    return wide if width >= height else wide.transpose(1, 0, 2)


@pytest.mark.parametrize("shape", [(100, 16), (16, 100)])
def test_the_first_is_the_middle_and_the_others_lie_anywhere_along(shape):
    pixels = ramp(*shape)
    crops = crop(pixels, "a" * 32, 16, 40, flips=False)
    assert np.array_equal(crops[0], generation_view(pixels, 16)) and all(one.shape == (3, 16, 16) for one in crops)
    starts = [int(one.min()) for one in crops]
    assert starts[0] == 42 and min(starts) < 12 and max(starts) > 72 and max(starts) <= 84


def test_the_choice_depends_on_uid_and_number_alone():
    pixels = ramp(100, 16)
    few, many = (crop(pixels, "a" * 32, 16, count, flips=False) for count in (3, 6))
    assert all(np.array_equal(one, other) for one, other in zip(few, many, strict=False))
    assert any(not np.array_equal(a, b) for a, b in zip(few, crop(pixels, "b" * 32, 16, 3, flips=False), strict=True))


def test_mirrors_are_off_unless_asked_for_and_spare_the_first():
    pixels = ramp(100, 16)
    plain, mirrored = (crop(pixels, "a" * 32, 16, 20, flips=flips) for flips in (False, True))
    turned = [not np.array_equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert not turned[0] and 3 < sum(turned) < 17
    assert all(np.array_equal(a[:, :, ::-1] if t else a, b) for a, b, t in zip(plain, mirrored, turned, strict=True))


def test_a_square_picture_has_one_place():
    content = picture_bytes(ramp(16, 16))
    found, which = distinct(crops_of(content, "a" * 32, 16, 5, flips=False))
    assert len(found) == 1 and which == [0] * 5
    found, which = distinct(crops_of(content, "a" * 32, 16, 12, flips=True))
    assert len(found) == 2 and set(which) == {0, 1}


def test_what_was_done_is_named_with_versions():
    assert preprocessing(384, 1, False).startswith("short side 384, middle of the long side; bicubic by ")
    assert "3 more along it by uid (mirrored by uid)" in preprocessing(384, 4, True)
    assert preprocessing(384, 4, True) != preprocessing(384, 4, False)
