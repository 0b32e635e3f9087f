"""Perceptual hashes on real pictures: copies are near, different pictures are far."""

import numpy as np
import pytest

from data_pipeline.images import ImageError
from data_pipeline.masks.dedup import DEFAULT_DISTANCE
from data_pipeline.masks.picture_hash import perceptual_hash
from tests.support.pictures import COPIES, digits, encoded, photograph_tiles, scenes
from tests.support.raw import picture_bytes


def hashes(files):
    found = [perceptual_hash(content) for content in files]
    return np.array([one.bits for one in found], np.uint64), np.array([one.is_flat for one in found])


def near_pairs(bits, distance):
    """Pairs of different pictures that are taken for one, and all pairs."""
    apart = np.bitwise_count(bits[:, None] ^ bits)[np.triu_indices(len(bits), 1)]
    return int((apart <= distance).sum()), len(apart)


@pytest.fixture(scope="module")
def originals():
    pictures = {"scenes": scenes(60), "photographs": photograph_tiles(), "digits": digits(120)}
    return {kind: (made, *hashes(encoded(pixels) for pixels in made)) for kind, made in pictures.items()}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize(("kind", "recall"), [("scenes", 1.0), ("photographs", 0.9), ("digits", 0.95)])
def test_copies_are_found(originals, kind, recall, copy):
    pictures, bits, is_flat = originals[kind]
    copied, _ = hashes(COPIES[copy](pixels) for pixels in pictures)
    near = np.bitwise_count(bits ^ copied) <= DEFAULT_DISTANCE
    assert near[~is_flat].mean() >= recall


@pytest.mark.parametrize(("kind", "share"), [("scenes", 0.0), ("photographs", 0.0), ("digits", 2e-4)])
def test_different_pictures_are_not(originals, kind, share):
    _, bits, is_flat = originals[kind]
    near, pairs = near_pairs(bits[~is_flat], DEFAULT_DISTANCE)
    assert near <= share * pairs


def test_mirrored_and_turned_pictures_differ(originals):
    pictures, bits, _ = originals["scenes"]
    for change in (lambda pixels: pixels[:, ::-1], lambda pixels: pixels[::-1], lambda pixels: pixels.swapaxes(0, 1)):
        changed, _ = hashes(encoded(np.ascontiguousarray(change(pixels))) for pixels in pictures)
        assert (np.bitwise_count(bits ^ changed) > 8).all()


def test_pictures_without_contrast_are_flat():
    random = np.random.default_rng(0)
    page = np.full((80, 60, 3), 250, np.uint8) - random.integers(0, 3, (80, 60, 3), dtype=np.uint8)
    assert perceptual_hash(encoded(page)).is_flat
    assert not perceptual_hash(encoded(scenes(1)[0])).is_flat


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_tiny_and_narrow_pictures_have_a_hash(kind):
    random = np.random.default_rng(0)
    for shape in ((1, 1, 3), (3, 200, 3), (200, 2, 3)):
        content = picture_bytes(random.integers(0, 255, shape, dtype=np.uint8), kind)
        assert 0 <= perceptual_hash(content).bits < 1 << 64


def test_what_is_no_picture_is_refused():
    whole = encoded(scenes(1)[0], "png")
    for content in (b"", b"text", whole[:200], whole[:16] + (20_000).to_bytes(4, "big") * 2 + whole[24:]):
        with pytest.raises(ImageError):
            perceptual_hash(content)
