"""The real handwriting of the demo, and the raw records that the ordinary prepare commands turn into shards.

1,797 digits ship inside scikit-learn as 8x8 pictures of 17 grey levels. They are shuffled with seed 0, 357 are held
out, and all are enlarged bicubically to colour pictures. Every training record is built from training pictures alone.
Which two pictures meet in a document, and which phrasing asks or describes, is drawn from generators keyed by the
seed and the name of the record file, so a file does not change when another one grows.

Shapes: small digits [n, 8, 8], pictures [n, side, side]; both uint8, 0 is paper and 255 is ink.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""How a digit is written in captions and answers."""
HELD_OUT_DIGITS = 357
"""Pictures that no training record shows."""
SMALL_SIDE = 8
"""Side of the digits as they ship, pixels."""
NUM_DIGITS = 10

CAPTIONS = ("{}", "the digit {}", "a handwritten {}", "the number {} written by hand", "a picture of the digit {}")
"""Phrasings that ask for a picture."""
QUESTIONS = ("What digit is this?", "Which number is shown?", "Read the digit.", "What is written here?")
"""Phrasings of the one question whose answer is the digit's word."""


@dataclass(frozen=True, slots=True)
class Digits:
    """One side of the split."""

    small: np.ndarray
    """uint8 [n, 8, 8]."""
    labels: np.ndarray
    """int64 [n], 0 ... 9."""


@dataclass(frozen=True, slots=True)
class RecordCounts:
    """How many documents of each kind are written; more than training reads costs time, fewer repeats documents."""

    pairs: int = 8000
    differences: int = 12000


def load_digits(seed: int = 0, held_out: int = HELD_OUT_DIGITS) -> tuple[Digits, Digits]:
    """Training and held-out digits after a shuffle with `seed`."""
    from sklearn.datasets import load_digits as load_bunch  # an extra of the package, wanted by the demo alone

    bunch = load_bunch()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    small = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[order]
    labels = bunch.target.astype(np.int64)[order]
    return Digits(small[:-held_out], labels[:-held_out]), Digits(small[-held_out:], labels[-held_out:])


def enlarge(small: np.ndarray, side: int) -> np.ndarray:
    """Pictures [n, side, side] from small digits [n, 8, 8], bicubically."""
    pictures = [Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC) for digit in small]
    return np.stack([np.asarray(picture) for picture in pictures])


def held_out_pairs(seed: int = 0) -> frozenset[tuple[int, int]]:
    """Ten ordered pairs that no training document reads: every digit is left out once on each side."""
    right = np.random.default_rng([seed, 7]).permutation(NUM_DIGITS)
    return frozenset((left, int(right[left])) for left in range(NUM_DIGITS))


def difference_words(left: int, right: int) -> str:
    """`left - right` in words; below zero it is `minus` and the word of the positive difference."""
    difference = left - right
    return ("minus " if difference < 0 else "") + DIGIT_WORDS[abs(difference)]


def pair_segments(left_path: str, right_path: str, answer: str) -> list[dict[str, Any]]:
    """Segments of a reading document: two pictures, the cue, the trained answer."""
    return [{"image": left_path}, {"image": right_path}, {"text": " reads", "loss": False}, {"text": f" {answer}"}]


def difference_segments(left_path: str, right_path: str, answer: str) -> list[dict[str, Any]]:
    """Segments of a difference document: picture, minus, picture, the cue, the trained answer."""
    return [
        {"image": left_path},
        {"text": " minus", "loss": False},
        {"image": right_path},
        {"text": " equals", "loss": False},
        {"text": f" {answer}"},
    ]


def caption_records(labels: np.ndarray, paths: list[str]) -> Iterator[dict[str, Any]]:
    """Pictures with all their captions."""
    for picture, (path, label) in enumerate(zip(paths, labels, strict=True)):
        captions = [phrasing.format(DIGIT_WORDS[label]) for phrasing in CAPTIONS]
        yield {"id": f"captions-{picture:05d}", "image": path, "captions": captions}


def description_records(labels: np.ndarray, paths: list[str]) -> Iterator[dict[str, Any]]:
    """One picture and its word: what understanding begins with."""
    for picture, (path, label) in enumerate(zip(paths, labels, strict=True)):
        segments = [{"image": path}, {"text": f" {DIGIT_WORDS[label]}"}]
        yield {"id": f"description-{picture:05d}", "segments": segments}


def question_records(labels: np.ndarray, paths: list[str]) -> Iterator[dict[str, Any]]:
    """Question-answer pairs on one picture: every picture under every phrasing."""
    for number, question in enumerate(QUESTIONS):
        for picture, (path, label) in enumerate(zip(paths, labels, strict=True)):
            uid = f"question-{number}-{picture:05d}"
            yield {"id": uid, "image": path, "question": question, "answer": DIGIT_WORDS[label]}


def pair_records(labels: np.ndarray, paths: list[str], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Two pictures and what they read in order; the held-out ordered pairs never occur."""
    left_out = held_out_pairs(seed)
    rng = np.random.default_rng([seed, 1])
    number = 0
    while number < count:
        left, right = (int(i) for i in rng.integers(len(paths), size=2))
        digits = int(labels[left]), int(labels[right])
        if digits in left_out:
            continue
        answer = " ".join(DIGIT_WORDS[digit] for digit in digits)
        yield {"id": f"pair-{number:06d}", "segments": pair_segments(paths[left], paths[right], answer)}
        number += 1


def difference_records(labels: np.ndarray, paths: list[str], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Two pictures and their difference in words; all ordered pairs of digits occur."""
    rng = np.random.default_rng([seed, 2])
    for number in range(count):
        left, right = (int(i) for i in rng.integers(len(paths), size=2))
        answer = difference_words(int(labels[left]), int(labels[right]))
        segments = difference_segments(paths[left], paths[right], answer)
        yield {"id": f"difference-{number:06d}", "segments": segments}
