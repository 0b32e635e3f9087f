"""Raw files of the demo, as a user would bring them: pictures as PNG and JSON lines beside them.

    pictures/train/, pictures/held_out/   00000.png ...
    prose_train.jsonl, prose_held_out.jsonl              {"id", "text"}
    descriptions.jsonl, questions.jsonl, pairs.jsonl, differences.jsonl    interleaved documents
    captions.jsonl                                       {"id", "image", "captions"}
    labels.json                                          the digit of every picture, for judges alone

Only `labels.json` and pictures/held_out know of held-out digits. The directory is complete or absent.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from janus_mega.demo import digits
from janus_mega.demo.prose import Prose, Text, collect_prose


@dataclass(frozen=True, slots=True)
class RawData:
    """Where the raw files are, and the pictures that judges need."""

    root: Path
    train: np.ndarray
    """uint8 [n, side, side], training pictures."""
    train_labels: np.ndarray
    """int64 [n]."""
    held_out: np.ndarray
    """uint8 [n, side, side]."""
    held_out_labels: np.ndarray
    """int64 [n]."""

    def file(self, name: str) -> Path:
        """Path of `<name>.jsonl`."""
        return self.root / f"{name}.jsonl"


def write_raw(
    root: Path,
    side: int,
    counts: digits.RecordCounts,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RawData:
    """Writes the raw directory and returns its content.

    Args:
        root: Directory to create, which must not exist; `<root>.tmp` beside it is used meanwhile.
        side: Side of the pictures, pixels.
        progress: Called with (files done, files in all).
    """
    train, held_out = digits.load_digits()
    data = RawData(
        root, digits.enlarge(train.small, side), train.labels, digits.enlarge(held_out.small, side), held_out.labels
    )
    aside = root.with_name(root.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for directory in ("train", "held_out"):
        (aside / "pictures" / directory).mkdir(parents=True)
    tasks = _tasks(aside, data, counts, seed)
    for number, task in enumerate(tasks, start=1):
        task()
        if progress is not None:
            progress(number, len(tasks))
    aside.rename(root)
    return data


def read_raw(root: Path) -> RawData:
    """The pictures and labels of a raw directory, as they were written."""
    labels = json.loads((root / "labels.json").read_text(encoding="utf-8"))
    pictures = {
        directory: np.stack(
            [
                np.asarray(Image.open(root / picture_name(directory, number)).convert("L"))
                for number in range(len(labels[directory]))
            ]
        )
        for directory in ("train", "held_out")
    }
    return RawData(
        root,
        pictures["train"],
        np.array(labels["train"], np.int64),
        pictures["held_out"],
        np.array(labels["held_out"], np.int64),
    )


def picture_name(directory: str, number: int) -> str:
    """Path of a picture relative to the raw directory."""
    return f"pictures/{directory}/{number:05d}.png"


def _tasks(aside: Path, data: RawData, counts: digits.RecordCounts, seed: int) -> list[Callable[[], None]]:
    """The writing of each group of files."""
    labels = data.train_labels
    paths = [picture_name("train", number) for number in range(len(labels))]
    records: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "captions": lambda: digits.caption_records(labels, paths),
        "descriptions": lambda: digits.description_records(labels, paths),
        "questions": lambda: digits.question_records(labels, paths),
        "pairs": lambda: digits.pair_records(labels, paths, counts.pairs, seed),
        "differences": lambda: digits.difference_records(labels, paths, counts.differences, seed),
    }

    def write_labels() -> None:
        content = {"train": labels.tolist(), "held_out": data.held_out_labels.tolist()}
        (aside / "labels.json").write_text(json.dumps(content), encoding="utf-8")

    def write_prose() -> None:
        prose: Prose = collect_prose()
        _write_jsonl(aside / "prose_train.jsonl", map(_prose_record, prose.train))
        _write_jsonl(aside / "prose_held_out.jsonl", map(_prose_record, prose.held_out))

    def write_records(name: str, make: Callable[[], Iterable[dict[str, Any]]]) -> Callable[[], None]:
        return lambda: _write_jsonl(aside / f"{name}.jsonl", make())

    return [
        lambda: _write_pictures(aside, "train", data.train),
        lambda: _write_pictures(aside, "held_out", data.held_out),
        write_labels,
        write_prose,
        *(write_records(name, make) for name, make in records.items()),
    ]


def _prose_record(text: Text) -> dict[str, str]:
    return {"id": text.uid, "text": text.text}


def _write_pictures(root: Path, directory: str, pictures: np.ndarray) -> None:
    """PNG files in colour, as encoders and tokenizers take them."""
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).convert("RGB").save(root / picture_name(directory, number))


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
