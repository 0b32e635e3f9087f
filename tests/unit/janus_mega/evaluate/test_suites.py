"""Suites count what a model did, item by item. The model here is scripted, so every count is known beforehand."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.schema import Document, LabelHead, TaskId, TokenKind
from janus_mega.demo import digits
from janus_mega.evaluate import metrics, suites
from janus_mega.evaluate.bigram import BigramModel
from janus_mega.evaluate.judges import DigitJudge
from janus_mega.infer.text import Prompt

pytest.importorskip("sklearn")
PROMPT = Prompt(np.zeros(3, np.int32))


class ScriptedModel:
    """Answers from a list, draws real digits (and errs below a guidance of 2), predicts every token with p = 1/4."""

    def __init__(self, answers: Sequence[str] = ()) -> None:
        self.answers = list(answers)
        self.tokenizer = SimpleNamespace(decode=lambda ids: "x" * (len(ids) - 2))
        train, _ = digits.load_digits()
        self.pictures = digits.enlarge(train.small, 16)
        self.labels = train.labels

    def generate_text(self, prompts: Sequence[Prompt], *, max_new_tokens: int, on_done: Any) -> list[str]:
        on_done(len(prompts))
        return self.answers[: len(prompts)]

    def draw(
        self, captions: Sequence[str], *, guidance_scale: float, temperature: float, seed: int, on_done: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        assert temperature == 1.0
        rng = np.random.default_rng(seed)
        wanted = [digits.DIGIT_WORDS.index(caption) for caption in captions]
        if guidance_scale < 2:
            wanted = [(digit + (number % 4 == 0)) % 10 for number, digit in enumerate(wanted)]
        chosen = np.array([rng.choice(np.flatnonzero(self.labels == digit)) for digit in wanted])
        on_done(len(captions))
        return chosen[:, None].astype(np.uint16), np.repeat(self.pictures[chosen][:, None], 3, axis=1)

    def label_log_probs(self, documents: Sequence[Document], *, on_done: Any) -> list[torch.Tensor]:
        self.scored = documents
        labels = [int((document.label_head != LabelHead.none).sum()) for document in documents]
        return [torch.full((count,), float(np.log(0.25))) for count in labels]


def text_document(ids: list[int]) -> Document:
    heads = np.full(len(ids), LabelHead.text, np.uint8)
    heads[-1] = LabelHead.none
    labels = np.array([*ids[1:], 0], np.int32)
    kinds = np.full(len(ids), TokenKind.text, np.uint8)
    return Document(np.array(ids, np.int32), kinds, labels, heads, TaskId.text)


def test_reading_strips_answers_and_counts_groups():
    wanted = ["three", "four five", "six", "six"]
    items = [suites.ReadingItem(str(n), PROMPT, text, "ab"[n % 2]) for n, text in enumerate(wanted)]
    done: list[int] = []
    readings = suites.read_items(ScriptedModel([" three", "four five ", "sixty", " six"]), items, 8, done.append)
    assert [reading.is_right for reading in readings] == [True, True, False, True]
    assert suites.reading_accuracy(readings) == 0.75
    assert suites.reading_accuracy(readings, "a") == 0.5
    assert suites.reading_accuracy(readings, "b") == 1.0
    assert suites.reading_accuracy(readings, "none") == 0.0
    assert sum(done) == 4
    assert readings[2].record() == {
        "uid": "2", "group": "a", "wanted": "six", "answered": "sixty", "is_right": False
    }  # fmt: skip


def test_answers_that_name_no_class_are_kept_apart():
    items = [suites.ReadingItem(str(n), PROMPT, text) for n, text in enumerate(["zero", "one"])]
    readings = suites.read_items(ScriptedModel(["one", "blue"]), items, 8)
    wanted, answered = suites.read_classes(readings, digits.DIGIT_WORDS)
    assert wanted.tolist() == [0, 1] and answered.tolist() == [1, metrics.NO_ANSWER]


def test_guidance_is_chosen_by_both_judges_and_drawings_leave_records():
    model = ScriptedModel()
    against = suites.JudgedPictures(DigitJudge(model.pictures, model.labels), model.pictures[:400], model.labels[:400])
    asked = np.arange(100) % 10
    captions = [digits.DIGIT_WORDS[digit] for digit in asked]
    scale, trials = suites.choose_guidance(model, captions, asked, against, scales=(1.0, 2.0), seed=3)
    assert scale == 2.0
    assert trials[0].accuracy == pytest.approx(0.75, abs=0.02) and trials[1].accuracy >= 0.99
    assert trials[0].coverage < trials[1].coverage
    drawings = suites.draw_captions(model, captions, asked, guidance_scale=scale, seed=4)
    records = list(drawings.records(against.judge.read(drawings.pictures)))
    assert len(records) == 100 and records[7]["asked"] == 7 and records[7]["caption"] == "seven"
    assert sum(record["is_right"] for record in records) >= 99


def test_text_is_scored_by_both_over_the_same_bytes():
    documents = [text_document([0, 3, 4, 1]), text_document([0, 3, 1])]
    bigram = BigramModel([document.input_ids for document in documents], 5)
    figures = suites.score_text(ScriptedModel(), documents, bigram, seq_len=8)
    assert (figures.num_documents, figures.num_tokens, figures.num_bytes) == (2, 5, 3)
    assert figures.model_bpb == pytest.approx(5 * 2 / 3)
    expected = sum(bigram.nats(document.input_ids) for document in documents) / np.log(2) / 3
    assert figures.bigram_bpb == pytest.approx(expected)


@pytest.mark.parametrize("length", [3, 7, 8, 9, 15, 16, 30])
def test_long_documents_are_cut_so_that_every_token_is_predicted_once(length):
    document = text_document(list(range(length)))
    model = ScriptedModel()
    figures = suites.score_text(model, [document], BigramModel([document.input_ids], 50), seq_len=8)
    assert figures.num_tokens == length - 1
    assert max(len(piece.input_ids) for piece in model.scored) <= 8
    predicted = [label for piece in model.scored for label in piece.labels[piece.label_head != LabelHead.none]]
    assert predicted == list(range(1, length))


def test_documents_that_are_not_all_text_are_refused():
    document = text_document([0, 3, 4, 1])
    document.label_head[1] = LabelHead.none
    with pytest.raises(ValueError, match="every position"):
        suites.score_text(ScriptedModel(), [document], BigramModel([document.input_ids], 5), seq_len=8)
