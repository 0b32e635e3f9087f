"""Does an exported directory say what our own model says? Checked with `transformers` alone on its side.

Three things can differ and are compared apart: the network (teacher-forced logits of whole documents), the prompts
(token ids and pixels that the exported processor makes of strings and pictures), and generation (greedy text and
greedy guided images by `generate`). Our side is any function from documents to logits, normally the training model
itself on packed rows, so packing and the map of names are under test together. A greedy sequence is checked against
such a function by replaying it: every id must be the likeliest one at its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from data_pipeline.dialogue import generation_pieces, pieces_text, question_pieces
from data_pipeline.schema import Document, LabelHead, TaskId, TokenKind
from data_pipeline.text import special
from janus_mega.infer.model import DocumentLogits, InferenceModel

LogitsFunction = Callable[[Sequence[Document]], list[DocumentLogits]]
"""Teacher-forced logits of documents, each on its own however they are packed."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What the two sides are asked."""

    documents: Sequence[Document]
    """For logits: of all kinds, trained or not."""
    questions: Sequence[tuple[str, Sequence[np.ndarray]]] = ()
    """For greedy text: questions with their pictures, uint8 [3, side, side]."""
    captions: Sequence[str] = ()
    """For greedy images."""


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """What `verify_export` found."""

    relative_diff: dict[str, float]
    """Largest relative difference of logits at `text`, `understanding` and `image` positions (see `relative_diff`)."""
    num_positions: dict[str, int]
    """Positions compared, of the same kinds."""
    prompts_equal: bool
    """The exported processor makes our ids and our pixels."""
    text_equal: bool
    """Greedy text: generate, our cached loop and the replay agree."""
    image_equal: bool
    """Greedy guided image ids: generate, our cached loop and the replay agree."""

    @property
    def max_relative_diff(self) -> float:
        """Largest over all kinds of positions."""
        return max(self.relative_diff.values(), default=0.0)

    @property
    def greedy_equal(self) -> bool:
        """Prompts, text and images are all equal."""
        return self.prompts_equal and self.text_equal and self.image_equal


def relative_diff(theirs: Tensor, ours: Tensor) -> float:
    """Largest difference at a position over the largest of our logits there; the worst position of [n, v]."""
    if not len(ours):
        return 0.0
    difference = (theirs.double() - ours.double()).abs().amax(dim=-1)
    return (difference / ours.double().abs().amax(dim=-1).clamp_min(1e-12)).max().item()


@torch.inference_mode()
def verify_export(
    export_dir: Path,
    ours: InferenceModel,
    probes: Probes,
    our_logits: LogitsFunction | None = None,
    *,
    guidance_scale: float = 5.0,
    max_new_tokens: int = 24,
) -> ExportCheck:
    """Compares an exported directory with our model.

    Args:
        export_dir: what `export_hf` wrote.
        ours: the checkpoint that was exported.
        probes: what both sides are asked.
        our_logits: our side of the comparison; `ours.logits` if None, which leaves packing and training layers out.
        guidance_scale: of greedy images.
        max_new_tokens: of greedy text.
    """
    our_logits = our_logits or ours.logits
    network = JanusForConditionalGeneration.from_pretrained(export_dir, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(export_dir, local_files_only=True)
    diffs: dict[str, float] = {}
    counts: dict[str, int] = {}
    for document, logits in zip(probes.documents, our_logits(probes.documents), strict=True):
        theirs = their_logits(network, processor, document)
        for kind, (places, head) in compared_positions(document).items():
            found = relative_diff(getattr(theirs, head)[places], getattr(logits, head).cpu()[places])
            diffs[kind] = max(diffs.get(kind, 0.0), found)
            counts[kind] = counts.get(kind, 0) + len(places)
    texts = [_greedy_text(network, processor, ours, probe, max_new_tokens) for probe in probes.questions]
    images = [_greedy_image(network, processor, ours, caption, guidance_scale) for caption in probes.captions]
    answers = [*texts, *images]
    return ExportCheck(
        relative_diff=diffs,
        num_positions=counts,
        prompts_equal=all(greedy.prompts_equal for greedy in answers),
        text_equal=all(greedy.theirs == greedy.ours and _replays_text(greedy, our_logits) for greedy in texts),
        image_equal=all(
            greedy.theirs == greedy.ours and _replays_image(greedy, our_logits, ours, guidance_scale)
            for greedy in images
        ),
    )


def compared_positions(document: Document) -> dict[str, tuple[Tensor, str]]:
    """Positions of each kind and the head that is compared there."""
    kinds = torch.from_numpy(document.token_kind.astype(np.int64))
    is_image = (kinds == int(TokenKind.image_gen)) | torch.from_numpy(document.label_head == LabelHead.image)
    chosen = {
        "text": (kinds == int(TokenKind.text), "text"),
        "understanding": (kinds == int(TokenKind.image_und), "text"),
        "image": (is_image, "image"),
    }
    return {kind: (torch.nonzero(mask)[:, 0], head) for kind, (mask, head) in chosen.items() if mask.any()}


def their_logits(network: JanusForConditionalGeneration, processor: Any, document: Document) -> DocumentLogits:
    """Both heads of an exported model over a document, its pictures through the exported image processor."""
    input_ids = torch.from_numpy(document.input_ids.astype(np.int64))[None]
    is_drawn = torch.from_numpy(document.token_kind == TokenKind.image_gen)[None]
    text_ids = input_ids.masked_fill(is_drawn, 0)
    if is_drawn.any():
        stream = network.get_input_embeddings()(text_ids)
        stream[is_drawn] = network.prepare_embeddings_for_image_generation(input_ids[is_drawn])
        hidden = network.model(inputs_embeds=stream).last_hidden_state[0]
    else:
        pixels = _their_pixels(processor, document.images) if document.images else None
        hidden = network.model(input_ids=text_ids, pixel_values=pixels).last_hidden_state[0]
    return DocumentLogits(network.lm_head(hidden).float(), network.model.generation_head(hidden).float())


def _their_pixels(processor: Any, images: Sequence[np.ndarray]) -> Tensor:
    pictures = [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images]
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


@dataclass(frozen=True, slots=True)
class _Greedy:
    """One greedy sequence from both sides."""

    prompt: np.ndarray
    is_understood: np.ndarray
    """Positions of the prompt that pictures fill."""
    images: tuple[np.ndarray, ...]
    theirs: list[int]
    ours: list[int]
    prompts_equal: bool


def _greedy_text(
    network: JanusForConditionalGeneration,
    processor: Any,
    ours: InferenceModel,
    probe: tuple[str, Sequence[np.ndarray]],
    max_new_tokens: int,
) -> _Greedy:
    question, images = probe
    prompt = ours.question(question, images)
    text = pieces_text(question_pieces(ours.dialogue.template, question, len(images)))
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images]
    inputs = processor(text=text, images=pictures or None, generation_mode="text", return_tensors="pt")
    sequence = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
    written = ours.generate_text_ids([prompt], max_new_tokens=max_new_tokens)[0]
    same_ids = inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
    theirs = sequence[inputs["input_ids"].shape[1] :].tolist()
    is_understood = prompt.input_ids == ours.dialogue.ids.image_placeholder
    return _Greedy(prompt.input_ids, is_understood, prompt.images, theirs, written, same_ids and chat == text)


def _greedy_image(
    network: JanusForConditionalGeneration,
    processor: Any,
    ours: InferenceModel,
    caption: str,
    guidance_scale: float,
) -> _Greedy:
    prompt = ours.dialogue.generation_prompt(caption)
    text = pieces_text(generation_pieces(ours.dialogue.template, caption)).removesuffix(special.BEGIN_OF_IMAGE)
    inputs = processor(text=text, generation_mode="image", return_tensors="pt")
    ids = network.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=guidance_scale)[0]
    drawn, _ = ours.draw([caption], guidance_scale=guidance_scale, temperature=0.0)
    same_ids = inputs["input_ids"][0].tolist() == prompt.tolist()
    return _Greedy(prompt, np.zeros(len(prompt), bool), (), ids.tolist(), drawn[0].tolist(), same_ids)


def _replays_text(greedy: _Greedy, our_logits: LogitsFunction) -> bool:
    chosen = our_logits([_continued(greedy, greedy.prompt, TokenKind.text)])[0].text.argmax(dim=-1)
    return chosen[len(greedy.prompt) - 1 : -1].tolist() == greedy.theirs


def _replays_image(greedy: _Greedy, our_logits: LogitsFunction, ours: InferenceModel, guidance_scale: float) -> bool:
    without = ours.dialogue.unconditional_prompt(greedy.prompt)
    documents = [_continued(greedy, prompt, TokenKind.image_gen) for prompt in (greedy.prompt, without)]
    conditional, unconditional = (logits.image for logits in our_logits(documents))
    guided = unconditional + guidance_scale * (conditional - unconditional)
    return guided.argmax(dim=-1)[len(greedy.prompt) - 1 : -1].tolist() == greedy.theirs


def _continued(greedy: _Greedy, prompt: np.ndarray, kind: TokenKind) -> Document:
    """A prompt and what their side made of it, as an unlabelled document."""
    input_ids = np.concatenate([prompt, np.asarray(greedy.theirs, np.int32)]).astype(np.int32)
    kinds = np.full(len(input_ids), kind, np.uint8)
    kinds[: len(prompt)] = np.where(greedy.is_understood, TokenKind.image_und, TokenKind.text)
    nothing = np.zeros(len(input_ids), np.int32)
    return Document(input_ids, kinds, nothing, nothing.astype(np.uint8), int(TaskId.text), greedy.images)
