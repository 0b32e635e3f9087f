"""What the demo's model is asked: held-out pictures in questions, pairs and differences, captions to draw.

All pictures are held-out ones. Which two meet is drawn from a generator keyed by the seed; every ordered pair of digits
is asked equally often, those left out of training included and also counted apart.
"""

import numpy as np

from janus_mega.demo import digits
from janus_mega.evaluate.suites import ReadingItem
from janus_mega.infer.model import InferenceModel

SEEN, UNSEEN = "seen pair", "unseen pair"
"""Groups of the pair reading."""
BELOW_ZERO, NOT_BELOW_ZERO = "below zero", "zero or above"
"""Groups of the differences."""
ANSWER_TOKENS = 12
"""More than any right answer needs."""


def as_rgb(pictures: np.ndarray) -> np.ndarray:
    """uint8 [n, 3, side, side] of grey pictures [n, side, side]."""
    return np.repeat(pictures[:, None], 3, axis=1)


def question_items(model: InferenceModel, pictures: np.ndarray, labels: np.ndarray) -> list[ReadingItem]:
    """Every picture under one phrasing, phrasings in turn."""
    items = []
    for number, (picture, label) in enumerate(zip(as_rgb(pictures), labels, strict=True)):
        question = digits.QUESTIONS[number % len(digits.QUESTIONS)]
        prompt = model.question(question, [picture])
        items.append(ReadingItem(f"question-{number:05d}", prompt, digits.DIGIT_WORDS[label], question))
    return items


def pair_items(
    model: InferenceModel, pictures: np.ndarray, labels: np.ndarray, repeats: int, seed: int
) -> list[ReadingItem]:
    """Two pictures to be read in order, every ordered pair of digits `repeats` times."""
    unseen = digits.held_out_pairs(seed)
    items = []
    for uid, left, right in _couples(labels, repeats, [seed, 11]):
        pair = int(labels[left]), int(labels[right])
        first, second = as_rgb(pictures[[left, right]])
        wanted = " ".join(digits.DIGIT_WORDS[digit] for digit in pair)
        group = UNSEEN if pair in unseen else SEEN
        items.append(ReadingItem(f"pair-{uid}", model.beginning([first, second, " reads"]), wanted, group))
    return items


def difference_items(
    model: InferenceModel, pictures: np.ndarray, labels: np.ndarray, repeats: int, seed: int
) -> list[ReadingItem]:
    """The difference of two pictures in words, every ordered pair of digits `repeats` times."""
    items = []
    for uid, left, right in _couples(labels, repeats, [seed, 12]):
        first, second = as_rgb(pictures[[left, right]])
        wanted = digits.difference_words(int(labels[left]), int(labels[right]))
        group = BELOW_ZERO if labels[left] < labels[right] else NOT_BELOW_ZERO
        prompt = model.beginning([first, " minus", second, " equals"])
        items.append(ReadingItem(f"difference-{uid}", prompt, wanted, group))
    return items


def captions_to_draw(count: int) -> tuple[list[str], np.ndarray]:
    """Captions and the digits they ask for, int64 [count]: digits in turn, phrasings in turn after all ten."""
    asked = np.arange(count) % digits.NUM_DIGITS
    phrasings = (np.arange(count) // digits.NUM_DIGITS) % len(digits.CAPTIONS)
    captions = [
        digits.CAPTIONS[phrasing].format(digits.DIGIT_WORDS[digit])
        for phrasing, digit in zip(phrasings, asked, strict=True)
    ]
    return captions, asked.astype(np.int64)


def _couples(labels: np.ndarray, repeats: int, key: list[int]) -> list[tuple[str, int, int]]:
    """(identity, left picture, right picture) for every ordered pair of digits."""
    rng = np.random.default_rng(key)
    having = [np.flatnonzero(labels == digit) for digit in range(digits.NUM_DIGITS)]
    couples = []
    for left in range(digits.NUM_DIGITS):
        for right in range(digits.NUM_DIGITS):
            for repeat in range(repeats):
                pictures = int(rng.choice(having[left])), int(rng.choice(having[right]))
                couples.append((f"{left}-{right}-{repeat:02d}", *pictures))
    return couples
