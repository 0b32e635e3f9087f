"""Cached loops against loops without a cache, stopping, seeds and batches."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.schema import Document, TaskId, TokenKind
from janus_mega.infer.model import InferenceModel, batches_of_equal_length
from janus_mega.infer.text import Prompt
from tests.support.documents import make_documents, random_images

CAPTIONS = ["a red square", "nine", "a red square", "a small blue circle beside it"]


def document(ids: Sequence[int], kinds: np.ndarray, images: tuple[np.ndarray, ...] = ()) -> Document:
    nothing = np.zeros(len(ids), np.int32)
    return Document(np.asarray(ids, np.int32), kinds, nothing, nothing.astype(np.uint8), int(TaskId.text), images)


def slow_image(model: InferenceModel, caption: str, guidance_scale: float) -> list[int]:
    """Greedy ids, every step a forward pass over both whole sequences."""
    prompt = model.dialogue.generation_prompt(caption)
    without = prompt.copy()
    without[1:-1] = model.dialogue.ids.pad
    ids: list[int] = []
    for _ in range(model.dialogue.geometry.generation_tokens):
        kinds = np.array([TokenKind.text] * len(prompt) + [TokenKind.image_gen] * len(ids), np.uint8)
        seen, blind = model.logits([document([*start, *ids], kinds) for start in (prompt, without)])
        guided = blind.image[-1] + guidance_scale * (seen.image[-1] - blind.image[-1])
        ids.append(int(guided.argmax()))
    return ids


def slow_text(model: InferenceModel, prompt: Prompt, num_tokens: int) -> list[int]:
    ids: list[int] = []
    for _ in range(num_tokens):
        kinds = np.full(len(prompt.input_ids) + len(ids), TokenKind.text, np.uint8)
        kinds[: len(prompt.input_ids)][prompt.input_ids == model.dialogue.ids.image_placeholder] = TokenKind.image_und
        logits = model.logits([document([*prompt.input_ids, *ids], kinds, prompt.images)])[0]
        ids.append(int(logits.text[-1].argmax()))
    return ids


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 5.0])
def test_drawing_equals_the_loop_without_cache(model: InferenceModel, guidance_scale: float) -> None:
    ids, pictures = model.draw(CAPTIONS, guidance_scale=guidance_scale, temperature=0.0)
    assert ids.tolist() == [slow_image(model, caption, guidance_scale) for caption in CAPTIONS]
    assert ids.dtype == np.uint16 and pictures.dtype == np.uint8 and pictures.shape == (4, 3, 16, 16)
    assert np.array_equal(pictures, model.trained.image_tokenizer.decode(ids))


def test_drawing_depends_on_seed_and_number_alone(model: InferenceModel) -> None:
    ids, _ = model.draw(CAPTIONS * 3, seed=1)
    for batch_size in (1, 5):
        assert np.array_equal(model.draw(CAPTIONS * 3, seed=1, batch_size=batch_size)[0], ids)
    assert np.array_equal(model.draw(CAPTIONS, seed=1)[0], ids[:4])
    assert not np.array_equal(model.draw(CAPTIONS * 3, seed=2)[0], ids)
    assert not np.array_equal(ids[0], ids[2])  # the same caption twice


def test_writing_equals_the_loop_without_cache(model: InferenceModel) -> None:
    images = random_images(3, 16)
    prompts = [
        model.question("What do you see?", images[:2]),
        model.question("Who?"),
        model.question("What do you see?", [images[2], images[0]]),
        model.beginning([images[1], " is a circle", images[0], " and"]),
    ]
    done: list[int] = []
    written = model.generate_text_ids(prompts, max_new_tokens=10, on_done=done.append)
    expected = [slow_text(model, prompt, 10) for prompt in prompts]
    eos = model.dialogue.ids.eos
    expected = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in expected]
    assert written == expected
    assert sum(done) == 4


def test_rows_stop_at_eos_and_the_others_go_on(model: InferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model.question("Who?")
    other = first.input_ids.copy()
    other[-4] += 1
    prompts = [first, Prompt(other)]  # equally long, so one batch
    free = model.generate_text_ids(prompts, max_new_tokens=8)
    stop = next(token for token in free[0] if token not in free[1])
    monkeypatch.setattr(model.dialogue, "ids", replace(model.dialogue.ids, eos=stop))
    stopped = model.generate_text_ids(prompts, max_new_tokens=8)
    assert stopped == [free[0][: free[0].index(stop) + 1], free[1]]


def test_sampled_text_depends_on_seed_and_number_alone(model: InferenceModel) -> None:
    prompts = [model.question(question) for question in ("Who?", "What do you see?", "Who?", "Which one?")]
    texts = model.generate_text(prompts, temperature=1.0, seed=3, max_new_tokens=12)
    assert model.generate_text(prompts, temperature=1.0, seed=3, max_new_tokens=12, batch_size=1) == texts
    assert model.generate_text(prompts, temperature=1.0, seed=4, max_new_tokens=12) != texts
    assert texts[0] != texts[2]


def test_scores_of_documents_do_not_depend_on_their_batch(model: InferenceModel) -> None:
    documents = make_documents(model.dialogue)
    together = model.logits(documents)
    for chosen, logits in zip(documents, together, strict=True):
        alone = model.logits([chosen])[0]
        assert torch.allclose(alone.text, logits.text, atol=1e-4)
        assert torch.allclose(alone.image, logits.image, atol=1e-4)


def test_label_log_probs_are_those_of_the_logits(model: InferenceModel) -> None:
    documents = make_documents(model.dialogue)
    scores = model.label_log_probs(documents, batch_size=2)
    for chosen, found in zip(documents, scores, strict=True):
        logits = model.logits([chosen])[0]
        expected = []
        for place in np.flatnonzero(chosen.label_head):
            table = logits.text if chosen.label_head[place] == 1 else logits.image
            expected.append(table[place].log_softmax(-1)[int(chosen.labels[place])])
        assert torch.allclose(found, torch.stack(expected), atol=1e-4) if expected else found.numel() == 0


def test_batches_hold_equal_lengths() -> None:
    lengths = [3, 5, 3, 3, 5, 4]
    batches = list(batches_of_equal_length(lengths, 2))
    assert sorted(number for batch in batches for number in batch) == list(range(6))
    assert all(len({lengths[number] for number in batch}) == 1 and len(batch) <= 2 for batch in batches)
