"""The quick resizer: what Pillow gives, and the same bytes on every x86 machine."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipeline import images
from data_pipeline.resize import resize

BICUBIC = Image.Resampling.BICUBIC


def pillow(pixels, width, height):
    """Rows first, then columns, in whichever order this Pillow would take them."""
    rows = Image.fromarray(pixels).resize((width, pixels.shape[0]), BICUBIC)
    return np.asarray(rows.resize((width, height), BICUBIC)).transpose(2, 0, 1)


def noise(random, height, width):
    """Black and white by chance: every overshoot of the filter shows."""
    return (random.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)


@pytest.mark.parametrize("view", ["understanding_view", "generation_view"])
@pytest.mark.parametrize("seed", range(4))
def test_views_are_within_two_grey_levels_of_pillow(monkeypatch, view, seed):
    random = np.random.default_rng(seed)
    sides = [(512, 512), (768, 1024), (640, 210), (90, 700), (3, 700), (1, 1), (384, 383)]
    sides += [tuple(random.integers(1, 700, 2)) for _ in range(8)]
    for height, width in sides:
        pixels = noise(random, height, width)
        if view == "generation_view" and max(height, width) > 100 * min(height, width):
            continue
        quick = getattr(images, view)(pixels, 384).astype(int)
        with monkeypatch.context() as patched:
            patched.setattr(images, "resize", pillow)
            slow = getattr(images, view)(pixels, 384)
        assert np.abs(quick - slow).max() <= 2, (height, width)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (768, 1024), (600, 400)])
def test_photographs_are_within_two_grey_levels_of_pillow_as_it_is(height, width):
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), BICUBIC)).astype(int)
    pixels = np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((384, 288), BICUBIC)).transpose(2, 0, 1).astype(int)
    assert np.abs(resize(pixels, 384, 288) - expected).max() <= 2


def test_a_picture_of_the_right_size_is_only_turned_into_planes():
    pixels = noise(np.random.default_rng(0), 6, 9)
    planes = resize(pixels, 9, 6)
    assert planes.flags.c_contiguous and np.array_equal(planes, pixels.transpose(2, 0, 1))


def test_views_of_other_memory_resize_alike():
    pixels = noise(np.random.default_rng(0), 60, 90)
    expected = resize(pixels, 30, 20)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    for same in (frozen, np.asfortranarray(pixels), np.repeat(pixels, 2, axis=1)[:, ::2]):
        assert np.array_equal(resize(same, 30, 20), expected)
    assert expected.shape == (3, 20, 30) and expected.flags.c_contiguous and expected.dtype == np.uint8


PROGRAM = """
import hashlib
import numpy as np, torch
from data_pipeline.resize import resize
random = np.random.default_rng(0)
digest = hashlib.sha256()
sides = [(*random.integers(1, 160, 2), *random.integers(2, 120, 2)) for _ in range(150)]
for height, width, h, w in [*sides, (512, 512, 384, 384), (600, 800, 288, 384), (2, 3000, 14, 384)]:
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    digest.update(resize(pixels, int(w), int(h)).tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bytes():
    """What a machine without AVX2 would compute is computed here, so hashes of batches agree between machines."""
    found = {}
    for capability in ("default", "avx2", None):
        chosen = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **chosen}
        command = [sys.executable, "-c", PROGRAM]
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        name, digest = output.split()
        found[name] = digest
    if len(found) < 2:
        pytest.skip(f"this processor or build knows one instruction set only ({', '.join(found)})")
    assert len(set(found.values())) == 1, found
