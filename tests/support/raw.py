"""Raw data as users bring it, a text tokenizer trained on it, and a small image tokenizer that is really one."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.train import train_sentencepiece

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "white": (250, 250, 250)}
PROSE = (
    "The order of the data is known before anything runs.\n\nA row holds documents side by side, none cut twice.",
    "def walk(tree):\n    for leaf in tree:\n        yield leaf  # every leaf, once\n",
    "Which colour does the picture show? It shows a small square, red on white or blue on green.",
    "Numbers such as 3, 14 and 159 are spelled digit by digit; tabs\tand   spaces are kept.",
)


class ColourTokenizer:
    """Nearest-colour vector quantisation of the cells of a grid: an image tokenizer without weights."""

    def __init__(self, image_size: int = 16, grid: int = 4, codebook_size: int = 64) -> None:
        self.image_size = image_size
        self.grid = grid
        self.num_tokens = grid * grid
        self.codebook_size = codebook_size
        self.codes = np.random.default_rng(7).integers(0, 256, (codebook_size, 3)).astype(np.float32)
        self.digest = hashlib.sha256(self.codes.tobytes() + bytes([image_size, grid])).hexdigest()
        self.num_encoded = 0

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Ids uint16 [n, grid * grid] of uint8 [n, 3, size, size]."""
        n, cell = len(images), self.image_size // self.grid
        self.num_encoded += n
        cells = images.astype(np.float32).reshape(n, 3, self.grid, cell, self.grid, cell).mean((3, 5))
        cells = cells.transpose(0, 2, 3, 1).reshape(n, self.num_tokens, 1, 3)
        return ((cells - self.codes) ** 2).sum(-1).argmin(-1).astype(np.uint16)


def picture(colour: str, width: int = 16, height: int = 16, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: a noisy square of one colour."""
    noise = np.random.default_rng(seed).integers(-20, 20, (height, width, 3))
    return np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)


def picture_bytes(pixels: np.ndarray, kind: str = "png") -> bytes:
    """A picture file: png, jpeg or webp."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, quality=95)
    return stream.getvalue()


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """One record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_raw(root: Path, num_pictures: int = 12) -> dict[str, Path]:
    """Writes pictures and one .jsonl of each kind; returns their paths by kind."""
    names, colours = [], []
    for number in range(num_pictures):
        colour = list(COLOURS)[number % len(COLOURS)]
        kind = ("png", "jpeg", "webp")[number % 3]
        width, height = ((16, 16), (40, 20), (17, 33))[number % 3]
        name = f"pictures/{number:03d}.{kind}"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture_bytes(picture(colour, width, height, number), kind))
        names.append(name)
        colours.append(colour)
    texts = [{"id": f"t{n}", "text": PROSE[n % len(PROSE)] + f" ({n})"} for n in range(num_pictures)]
    documents = []
    for n in range(num_pictures):
        if n % 2:
            documents.append({"id": f"q{n}", "image": names[n], "question": "Which colour?", "answer": colours[n]})
        else:
            segments = [{"image": names[n]}, {"image": names[n - 1]}]
            segments += [{"text": " shows", "loss": False}, {"text": f" {colours[n]} then {colours[n - 1]}"}]
            documents.append({"id": f"d{n}", "segments": segments})
    captions = [
        {
            "id": f"c{n}",
            "image": names[n],
            "captions": [f"a {colours[n]} square", f"{colours[n]}, plainly"][: 1 + n % 2],
        }
        for n in range(num_pictures)
    ]
    return {
        "text": write_jsonl(root / "text.jsonl", texts),
        "interleaved": write_jsonl(root / "documents.jsonl", documents),
        "t2i": write_jsonl(root / "captions.jsonl", captions),
    }


def train_tokenizer(root: Path) -> TextTokenizer:
    """A sentencepiece tokenizer of the texts above."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "prose.txt").write_text("\n".join(PROSE * 3), encoding="utf-8")
    return train_sentencepiece([root / "prose.txt"], 400, root / "text.model")
