"""Pictures that look like pictures (tiles of photographs, handwritten digits, scenes with the spectrum of nature), and
the copies of them that the web is full of.
"""

import io

import numpy as np
from PIL import Image


def scenes(count: int, side: int = 128, seed: int = 0) -> list[np.ndarray]:
    """Random uint8 [side, side, 3] whose power falls with frequency as it does in photographs."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    frequency[0, 0] = 1
    made = []
    for _ in range(count):
        spectrum = np.fft.fft2(random.normal(size=(side, side))) / frequency ** random.uniform(1, 1.5)
        light = np.fft.ifft2(spectrum).real
        light = (light - light.mean()) / light.std()
        tint = random.uniform(0.6, 1, 3)
        made.append(np.clip((light[..., None] * 45 + 125) * tint, 0, 255).astype(np.uint8))
    return made


def photograph_tiles(side: int = 142) -> list[np.ndarray]:
    """Disjoint tiles of scikit-learn's two photographs, uint8 [side, side, 3]."""
    from sklearn.datasets import load_sample_images

    return [
        photograph[top : top + side, left : left + side]
        for photograph in load_sample_images().images
        for top in range(0, photograph.shape[0] - side + 1, side)
        for left in range(0, photograph.shape[1] - side + 1, side)
    ]


def digits(count: int, side: int = 64) -> list[np.ndarray]:
    """Handwritten digits, enlarged: the hard case, different pictures that look alike."""
    from sklearn.datasets import load_digits

    made = []
    for digit in load_digits().images[:count]:
        picture = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        made.append(np.asarray(picture.convert("RGB")))
    return made


def encoded(pixels: np.ndarray, kind: str = "jpeg", quality: int = 95) -> bytes:
    """A picture file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, quality=quality)
    return stream.getvalue()


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The same picture in another size."""
    height, width = pixels.shape[:2]
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def brightened(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Every pixel lighter."""
    return np.clip(pixels.astype(int) + levels, 0, 255).astype(np.uint8)


COPIES = {
    "jpeg of quality 75": lambda pixels: encoded(pixels, quality=75),
    "jpeg of quality 40": lambda pixels: encoded(pixels, quality=40),
    "webp": lambda pixels: encoded(pixels, "webp", 80),
    "png": lambda pixels: encoded(pixels, "png"),
    "half size": lambda pixels: encoded(resized(pixels, 0.5), quality=90),
    "larger": lambda pixels: encoded(resized(pixels, 1.5), quality=90),
    "brighter": lambda pixels: encoded(brightened(pixels, 12)),
}
