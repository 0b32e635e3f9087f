"""The three kinds of tests: reading pictures, drawing captions, predicting text. Each keeps its items.

A suite takes a model and items and gives results item by item; figures are sums over those. What the items are about
is the caller's business. The model is `infer.InferenceModel`; answers are greedy, so a suite gives the same twice.

Shapes: `n` items, `i` image ids per picture.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.schema import Document, LabelHead
from data_pipeline.stream.assemble import cut_document
from janus_mega.evaluate import metrics
from janus_mega.evaluate.bigram import BigramModel
from janus_mega.evaluate.judges import DigitJudge, coverage_score
from janus_mega.infer.model import InferenceModel
from janus_mega.infer.text import Prompt

OnDone = Callable[[int], object]
"""Called with how many more items are finished."""


def ignore(count: int) -> None:
    """Tells nobody."""


# ---- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadingItem:
    """A prompt with pictures and the one right answer."""

    uid: str
    prompt: Prompt
    wanted: str
    group: str = ""
    """Items of a group are also counted apart."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was answered."""

    item: ReadingItem
    answered: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the wanted one, spaces around it apart."""
        return self.answered == self.item.wanted

    def record(self) -> dict[str, Any]:
        """The item as a line of JSON."""
        return {
            "uid": self.item.uid,
            "group": self.item.group,
            "wanted": self.item.wanted,
            "answered": self.answered,
            "is_right": self.is_right,
        }


def read_items(
    model: InferenceModel, items: Sequence[ReadingItem], max_new_tokens: int, on_done: OnDone = ignore
) -> list[Reading]:
    """Greedy answers to all items."""
    answers = model.generate_text([item.prompt for item in items], max_new_tokens=max_new_tokens, on_done=on_done)
    return [Reading(item, answer.strip()) for item, answer in zip(items, answers, strict=True)]


def reading_accuracy(readings: Sequence[Reading], group: str | None = None) -> float:
    """Share of right answers, over all items or one group."""
    chosen = [reading.is_right for reading in readings if group is None or reading.item.group == group]
    return sum(chosen) / len(chosen) if chosen else 0.0


def read_classes(readings: Sequence[Reading], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Wanted and answered class numbers int64 [n]; an answer that is no name is `metrics.NO_ANSWER`."""
    number = {name: place for place, name in enumerate(names)}
    wanted = [number[reading.item.wanted] for reading in readings]
    answered = [number.get(reading.answered, metrics.NO_ANSWER) for reading in readings]
    return np.array(wanted, np.int64), np.array(answered, np.int64)


# ---- drawing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drawings:
    """Drawn pictures with what was asked for."""

    captions: tuple[str, ...]
    asked: np.ndarray
    """Class asked for, int64 [n]."""
    ids: np.ndarray
    """uint16 [n, i]."""
    pictures: np.ndarray
    """uint8 [n, 3, side, side]."""

    def records(self, read: np.ndarray) -> Iterator[dict[str, Any]]:
        """One line of JSON per drawing; `read` is what a judge saw, int64 [n]."""
        for number, caption in enumerate(self.captions):
            yield {
                "uid": f"drawing-{number:05d}",
                "caption": caption,
                "asked": int(self.asked[number]),
                "read": int(read[number]),
                "is_right": bool(read[number] == self.asked[number]),
                "ids": self.ids[number].tolist(),
            }


@dataclass(frozen=True, slots=True)
class JudgedPictures:
    """Real pictures that drawings are held against; the judge must have been fitted on training pictures."""

    judge: DigitJudge
    real: np.ndarray
    """uint8 [m, side, side], pictures that a judge of drawings reads."""
    labels: np.ndarray
    """int64 [m]."""


def draw_captions(
    model: InferenceModel,
    captions: Sequence[str],
    asked: np.ndarray,
    *,
    guidance_scale: float,
    seed: int,
    on_done: OnDone = ignore,
) -> Drawings:
    """One drawing per caption at temperature 1."""
    ids, pictures = model.draw(captions, guidance_scale=guidance_scale, temperature=1.0, seed=seed, on_done=on_done)
    return Drawings(tuple(captions), asked, ids, pictures)


def score_drawings(drawings: Drawings, against: JudgedPictures) -> tuple[float, float]:
    """(share read as asked by the judge of real digits, coverage score on the real pictures)."""
    read = against.judge.read(drawings.pictures)
    coverage = coverage_score(drawings.pictures, drawings.asked, against.real, against.labels)
    return metrics.accuracy(read, drawings.asked), coverage


@dataclass(frozen=True, slots=True)
class GuidanceTrial:
    """A guidance scale and how drawings at it scored."""

    guidance_scale: float
    accuracy: float
    coverage: float

    @property
    def score(self) -> float:
        """Both virtues count alike: guidance buys the first with the second."""
        return self.accuracy + self.coverage


def choose_guidance(
    model: InferenceModel,
    captions: Sequence[str],
    asked: np.ndarray,
    against: JudgedPictures,
    *,
    scales: Sequence[float],
    seed: int,
    on_done: OnDone = ignore,
) -> tuple[float, list[GuidanceTrial]]:
    """The scale with the best score among `scales`, and all trials; `against` must hold training pictures."""
    trials = []
    for scale in scales:
        drawings = draw_captions(model, captions, asked, guidance_scale=scale, seed=seed, on_done=on_done)
        trials.append(GuidanceTrial(scale, *score_drawings(drawings, against)))
    return max(trials, key=lambda trial: trial.score).guidance_scale, trials


# ---- text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextFigures:
    """Bits per byte of the same documents under the model and under the bigram."""

    model_bpb: float
    bigram_bpb: float
    num_documents: int
    num_tokens: int
    num_bytes: int


def score_text(
    model: InferenceModel, documents: Sequence[Document], bigram: BigramModel, seq_len: int, on_done: OnDone = ignore
) -> TextFigures:
    """Both predict every token after bos, eos included; bytes are those of the text without special tokens.

    The model reads at most seq_len tokens at a time, as in training: a longer document continues in a piece that
    begins with the last token of the piece before, so that every token is predicted once.
    """
    for document in documents:
        if (document.label_head[:-1] != LabelHead.text).any():
            raise ValueError("text documents must be trained on at every position but the last")
    pieces = [piece for document in documents for piece in _pieces(document, seq_len)]
    log_probs = model.label_log_probs(pieces, on_done=on_done)
    num_bytes = sum(len(model.tokenizer.decode(document.input_ids).encode()) for document in documents)
    model_nats = -sum(float(values.double().sum()) for values in log_probs)
    bigram_nats = sum(bigram.nats(document.input_ids) for document in documents)
    return TextFigures(
        metrics.bits_per_byte(model_nats, num_bytes),
        metrics.bits_per_byte(bigram_nats, num_bytes),
        len(documents),
        sum(len(values) for values in log_probs),
        num_bytes,
    )


def _pieces(document: Document, seq_len: int) -> Iterator[Document]:
    """The document in pieces of at most seq_len tokens that share one token at each border."""
    length = len(document.input_ids)
    for start in range(0, max(length - 1, 1), seq_len - 1):
        yield cut_document(document, start, min(start + seq_len, length))
