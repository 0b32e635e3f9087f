"""The raw data that every system converts: drawings as ids with captions, texts, and JPEG photos with captions.

Nothing can be downloaded for a comparison that anyone can repeat, so all of it is made here from a seed. Captions are
half short and half dense, as generation data has them, texts are log-normal in length, image ids are uniform (real ones
are close to it: they hardly compress). Photos are crops of the two photographs that scikit-learn brings along, scaled,
turned, recoloured and given grain until a file of quality 90 has as many bytes a pixel as camera pictures have.

    tokenizer.model, captions.jsonl, text.jsonl     raw records of ours
    pictures/000001.png                             16 px, whose first pixel names the row of ids it stands for
    image_ids.npy, caption_*.npy, text_*.npy        the same as ids, for the peers: flat ids and ends
    photos512/, photos1024/                         JPEG files and captions.jsonl
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NUM_IDS = 576
"""Ids of a drawing."""
CODEBOOK = 16384
PICTURE_SIZE = 16
"""Side of the stand-in pictures, pixels."""

_DONE = "sizes.json"
_VOCABULARY = 2000
_MAX_TEXT_WORDS = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much there is of everything."""

    drawings: int = 20_000
    texts: int = 5_000
    photos: int = 240
    """JPEG files of each of the two sizes."""
    accesses: int = 5_000
    """Samples read by number."""
    encoded: int = 32
    """Photos encoded by the image tokenizer."""
    repeats: int = 5


TINY = Sizes(drawings=320, texts=80, photos=4, accesses=32, encoded=1, repeats=1)
"""For a check that everything runs; its figures say nothing."""


def make_raw(place: Path, sizes: Sizes) -> None:
    """Writes the raw data, unless the same is there already."""
    wanted = json.dumps([1, sizes.drawings, sizes.texts, sizes.photos])
    if (place / _DONE).exists() and (place / _DONE).read_text(encoding="utf-8") == wanted:
        return
    place.mkdir(parents=True, exist_ok=True)
    (place / _DONE).unlink(missing_ok=True)
    random = np.random.default_rng(0)
    words = _words(random)
    _write_tokens(place, sizes, random, words)
    for name, (width, height) in (("photos512", (512, 512)), ("photos1024", (1024, 768))):
        _write_photos(place / name, sizes.photos, (width, height), random)
    (place / _DONE).write_text(wanted, encoding="utf-8")


def _words(random: np.random.Generator) -> np.ndarray:
    """A vocabulary of made-up words."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return np.array(["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(3000)])


def _write_tokens(place: Path, sizes: Sizes, random: np.random.Generator, words: np.ndarray) -> None:
    from data_pipeline.text.train import train_sentencepiece

    # Frequencies fall as those of natural words do.
    share = 1 / np.arange(3, len(words) + 3)
    share /= share.sum()

    def text(num_words: int) -> str:
        return " ".join(random.choice(words, num_words, p=share))

    captions = [
        text(int(random.integers(6, 16) if number % 2 else random.integers(40, 100)))
        for number in range(sizes.drawings)
    ]
    lengths = np.minimum(random.lognormal(math.log(500), 0.8, sizes.texts).astype(int) + 5, _MAX_TEXT_WORDS)
    texts = [text(int(length)) for length in lengths]
    _write_lines(
        place / "captions.jsonl",
        [
            {"id": f"drawing {number}", "image": f"pictures/{number:06d}.png", "caption": caption}
            for number, caption in enumerate(captions)
        ],
    )
    _write_lines(place / "text.jsonl", [{"id": f"text {number}", "text": one} for number, one in enumerate(texts)])
    (place / "training.txt").write_text("\n".join(text(20) for _ in range(4000)), encoding="utf-8")
    tokenizer = train_sentencepiece([place / "training.txt"], _VOCABULARY, place / "tokenizer.model")
    for name, content in (("caption", [" " + caption for caption in captions]), ("text", texts)):
        rows = [tokenizer.encode(one) for one in content]
        np.save(place / f"{name}_ids.npy", np.concatenate([np.array(row, "<u2") for row in rows]))
        np.save(place / f"{name}_ends.npy", np.cumsum([len(row) for row in rows]))
    np.save(place / "image_ids.npy", random.integers(0, CODEBOOK, (sizes.drawings, NUM_IDS)).astype("<u2"))
    (place / "pictures").mkdir(exist_ok=True)
    for number in range(sizes.drawings):
        picture = np.zeros((PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
        picture[0, 0] = number >> 16, number >> 8 & 255, number & 255
        Image.fromarray(picture).save(place / "pictures" / f"{number:06d}.png", compress_level=1)


def _write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _write_photos(place: Path, count: int, size: tuple[int, int], random: np.random.Generator) -> None:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    place.mkdir(exist_ok=True)
    records = []
    for number in range(count):
        name = f"{number:06d}.jpg"
        (place / name).write_bytes(_jpeg(_photo(photographs[number % len(photographs)], size, random)))
        records.append({"id": f"{place.name} {number}", "image": name, "caption": f"photo number {number}"})
    _write_lines(place / "captions.jsonl", records)


def _photo(photograph: np.ndarray, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """A new picture out of an old one, uint8 [height, width, 3]."""
    width, height = size
    share = random.uniform(0.6, 1.0)
    crop_width = int(min(photograph.shape[1], photograph.shape[0] * width / height) * share)
    crop_height = int(crop_width * height / width)
    left = int(random.integers(0, photograph.shape[1] - crop_width + 1))
    top = int(random.integers(0, photograph.shape[0] - crop_height + 1))
    crop = Image.fromarray(photograph[top : top + crop_height, left : left + crop_width])
    pixels = np.asarray(crop.resize(size, Image.Resampling.LANCZOS), np.float32)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = pixels * random.uniform(0.85, 1.15, 3).astype(np.float32) + np.float32(random.uniform(-15, 15))
    # Grain gives back the fine detail that enlarging has smoothed away.
    grain = random.normal(0, 1, (height, width, 1)).astype(np.float32)
    return np.clip(pixels + grain * np.float32(random.uniform(2, 5)), 0, 255).astype(np.uint8)


def _jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def token_samples(raw: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, image ids, text ids) of every drawing and text, mixed: what the peers convert."""
    image_ids = np.load(raw / "image_ids.npy")
    nothing = np.empty(0, "<u2")
    samples = [(f"d{number:07d}", image_ids[number], ids) for number, ids in enumerate(_rows(raw, "caption"))]
    samples += [(f"t{number:07d}", nothing, ids) for number, ids in enumerate(_rows(raw, "text"))]
    return [samples[number] for number in _mixing(len(samples))]


def sample_names(raw: Path) -> list[str]:
    """Names of the token samples in the order of `token_samples`."""
    names = [f"d{number:07d}" for number in range(len(np.load(raw / "caption_ends.npy")))]
    names += [f"t{number:07d}" for number in range(len(np.load(raw / "text_ends.npy")))]
    return [names[number] for number in _mixing(len(names))]


def _mixing(count: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(count)


def _rows(raw: Path, name: str) -> list[np.ndarray]:
    ids, ends = np.load(raw / f"{name}_ids.npy"), np.load(raw / f"{name}_ends.npy")
    return np.split(ids, ends[:-1])


def photo_samples(photos: Path) -> list[tuple[str, bytes, str]]:
    """(name, JPEG bytes, caption) of every photo of a directory."""
    lines = (photos / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(f"p{n:07d}", (photos / one["image"]).read_bytes(), one["caption"]) for n, one in enumerate(records)]


def bytes_per_pixel(photos: Path) -> float:
    """How many bytes of file a pixel of the photos takes."""
    pixels = size = 0
    for path in photos.glob("*.jpg"):
        with Image.open(path) as picture:
            pixels += picture.width * picture.height
        size += path.stat().st_size
    return size / pixels
