"""A trained Janus for generation and scoring: transformers' classes with our weights, our prompts, our loops.

Nothing is written in between: weights go from the checkpoint through the map of names into the Llama (whose key-value
cache is the reason to use it), the encoder, adaptors and heads. Rows of a batch never need an attention mask: prompts
are batched by equal length, and scored documents are padded behind their end, where causal attention cannot see.

Shapes: `b` rows, `n` positions, `h` hidden size, `v` text vocabulary, `c` image codes, `m` images, `p` tokens of one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.schema import Document, LabelHead, TokenKind
from janus_mega.checkpoint.hf.model import build_hf_model
from janus_mega.checkpoint.trained import TrainedModel, open_trained
from janus_mega.infer.drawing import DrawingRequest, draw_ids
from janus_mega.infer.text import Prompt, write_text
from janus_mega.models.vision.siglip import normalize_pixels

SCORED_ROWS = 4096
"""Positions that go through a head at a time when documents are scored; bounds the memory of logits."""


@dataclass(frozen=True, slots=True)
class DocumentLogits:
    """What both heads say at every position of one document, fp32."""

    text: Tensor
    """[n, v]."""
    image: Tensor
    """[n, c]."""


class InferenceModel:
    """One trained model on one device; every method runs without gradients."""

    def __init__(self, trained: TrainedModel, device: torch.device | str = "cpu") -> None:
        """Takes all weights of a checkpoint into memory."""
        self.trained = trained
        self.dialogue = trained.dialogue
        self.tokenizer = trained.text_tokenizer
        self.device = torch.device(device)
        self.network = build_hf_model(trained).to(self.device)

    # ---- generation ----------------------------------------------------------------------------------------------

    def question(self, question: str, images: Sequence[np.ndarray] = (), system: str = "") -> Prompt:
        """The prompt of a question about images (uint8 [3, side, side] each)."""
        return Prompt(self.dialogue.question_prompt(question, len(images), system), tuple(images))

    def beginning(self, parts: Sequence[str | np.ndarray]) -> Prompt:
        """The beginning of an interleaved document of texts and images, to be continued."""
        images = tuple(part for part in parts if not isinstance(part, str))
        texts = [part if isinstance(part, str) else None for part in parts]
        return Prompt(self.dialogue.interleaved_prompt(texts), images)

    @torch.inference_mode()
    def generate_text(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        on_done: Callable[[int], object] = lambda count: None,
    ) -> list[str]:
        """What follows each prompt, up to eos or `max_new_tokens`, without special tokens.

        Args:
            prompts: from `question` or `beginning`.
            max_new_tokens: upper limit per prompt.
            temperature: 0 takes the likeliest token.
            seed: with the number of a prompt fixes its draws, whatever the batch.
            batch_size: prompts that run together.
            on_done: called with how many more prompts are finished.
        """
        rows = self.generate_text_ids(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            on_done=on_done,
        )
        size = self.tokenizer.vocab_size  # ids that only pad the vocabulary stand for no text
        return [self.tokenizer.decode(token for token in ids if token < size) for ids in rows]

    @torch.inference_mode()
    def generate_text_ids(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        on_done: Callable[[int], object] = lambda count: None,
    ) -> list[list[int]]:
        """As `generate_text`, as ids; eos is included where it was reached."""
        noise = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
        results: list[list[int]] = [[] for _ in prompts]
        for numbers in batches_of_equal_length([len(prompt.input_ids) for prompt in prompts], batch_size):
            chosen = [prompts[number] for number in numbers]
            input_ids = torch.from_numpy(np.stack([prompt.input_ids for prompt in chosen])).long().to(self.device)
            embedded = self.embed(
                input_ids,
                input_ids == self.dialogue.ids.image_placeholder,
                None,
                [image for prompt in chosen for image in prompt.images],
            )
            written = write_text(self.network, embedded, self.dialogue.ids.eos, noise[numbers], temperature)
            for number, ids in zip(numbers, written, strict=True):
                results[number] = ids
            on_done(len(numbers))
        return results

    @torch.inference_mode()
    def draw(
        self,
        captions: Sequence[str],
        *,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        on_done: Callable[[int], object] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws one image per caption: ids uint16 [captions, tokens] and pictures uint8 [captions, 3, side, side].

        Args:
            captions: what to draw.
            guidance_scale: logits = unconditional + scale * (conditional - unconditional); 1 is without guidance.
            temperature: divides guided logits; 0 takes the likeliest id.
            seed: with the number of a caption fixes its draws, whatever the batch.
            batch_size: images that are drawn together.
            on_done: called with how many more images are finished.
        """
        prompts = [self.dialogue.generation_prompt(caption) for caption in captions]
        num_tokens = self.dialogue.geometry.generation_tokens
        noise = torch.rand(len(prompts), num_tokens, generator=torch.Generator().manual_seed(seed))
        ids = np.zeros((len(prompts), num_tokens), np.uint16)
        for numbers in batches_of_equal_length([len(prompt) for prompt in prompts], batch_size):
            rows = torch.from_numpy(np.stack([prompts[number] for number in numbers])).long()
            without = torch.from_numpy(self.dialogue.unconditional_prompt(rows[0].numpy())).long()
            request = DrawingRequest(rows.to(self.device), without.to(self.device), noise[numbers])
            drawn = draw_ids(self.network, request, guidance_scale=guidance_scale, temperature=temperature)
            ids[numbers] = drawn.cpu().numpy().astype(np.uint16)
            on_done(len(numbers))
        return ids, self.trained.image_tokenizer.decode(ids)

    # ---- scoring -------------------------------------------------------------------------------------------------

    def embed(
        self, input_ids: Tensor, is_understood: Tensor, is_drawn: Tensor | None, images: Sequence[np.ndarray]
    ) -> Tensor:
        """Stream [b, n, h] of ids int64 [b, n].

        Args:
            input_ids: text ids, or image ids where `is_drawn`.
            is_understood: bool [b, n], positions that image features fill in order.
            is_drawn: bool [b, n], positions of image ids; None where there are none.
            images: uint8 [3, side, side] each.
        """
        parts = self.network.model
        if is_drawn is None:
            return self._with_images(parts.language_model.embed_tokens(input_ids), is_understood, images)
        stream = parts.language_model.embed_tokens(input_ids.masked_fill(is_drawn, 0))
        drawn = self.network.prepare_embeddings_for_image_generation(input_ids[is_drawn])
        stream[is_drawn] = drawn
        return self._with_images(stream, is_understood, images)

    def _with_images(self, stream: Tensor, is_understood: Tensor, images: Sequence[np.ndarray]) -> Tensor:
        if images:
            pixels = normalize_pixels(torch.from_numpy(np.stack(images)).to(self.device))
            features = self.network.model.get_image_features(pixels).pooler_output  # [m, p, h]
            stream[is_understood] = features.flatten(0, 1)
        return stream

    @torch.inference_mode()
    def hidden_states(self, documents: Sequence[Document]) -> list[Tensor]:
        """Last hidden states [n, h] of each document, all run together."""
        longest = max(len(document.input_ids) for document in documents)
        input_ids = torch.zeros(len(documents), longest, dtype=torch.long)
        kinds = torch.full((len(documents), longest), int(TokenKind.pad))
        for number, document in enumerate(documents):
            input_ids[number, : len(document.input_ids)] = torch.from_numpy(document.input_ids.astype(np.int64))
            kinds[number, : len(document.input_ids)] = torch.from_numpy(document.token_kind.astype(np.int64))
        images = [image for document in documents for image in document.images]
        kinds = kinds.to(self.device)
        stream = self.embed(
            input_ids.to(self.device), kinds == int(TokenKind.image_und), kinds == int(TokenKind.image_gen), images
        )
        hidden = self.network.model.language_model(inputs_embeds=stream, use_cache=False).last_hidden_state
        return [hidden[number, : len(document.input_ids)] for number, document in enumerate(documents)]

    @torch.inference_mode()
    def logits(self, documents: Sequence[Document]) -> list[DocumentLogits]:
        """Both heads at every position, teacher-forced; meant for comparisons, as it keeps whole vocabularies."""
        heads = self.network.lm_head, self.network.model.generation_head
        return [DocumentLogits(*(head(hidden).float() for head in heads)) for hidden in self.hidden_states(documents)]

    def text_logits(self, document: Document) -> Tensor:
        """Text head at every position of a document, fp32 [n, v], teacher-forced."""
        return self.logits([document])[0].text

    @torch.inference_mode()
    def label_log_probs(
        self,
        documents: Sequence[Document],
        *,
        batch_size: int = 16,
        on_done: Callable[[int], object] = lambda count: None,
    ) -> list[Tensor]:
        """Natural log of the probability of each label, in order, fp32 [labels of the document] on the CPU."""
        results = [torch.empty(0)] * len(documents)
        order = sorted(range(len(documents)), key=lambda number: len(documents[number].input_ids))
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            chosen = [documents[number] for number in numbers]
            for number, document, hidden in zip(numbers, chosen, self.hidden_states(chosen), strict=True):
                results[number] = self._label_log_probs(document, hidden)
            on_done(len(numbers))
        return results

    def _label_log_probs(self, document: Document, hidden: Tensor) -> Tensor:
        scores = torch.zeros(len(document.input_ids))
        heads = {LabelHead.text: self.network.lm_head, LabelHead.image: self.network.model.generation_head}
        for kind, head in heads.items():
            places = torch.from_numpy(np.flatnonzero(document.label_head == kind))
            labels = torch.from_numpy(document.labels.astype(np.int64))[places].to(self.device)
            for part, wanted in zip(places.split(SCORED_ROWS), labels.split(SCORED_ROWS), strict=True):
                log_probs = head(hidden[part.to(self.device)]).float().log_softmax(dim=-1)
                scores[part] = log_probs.gather(1, wanted[:, None])[:, 0].cpu()
        return scores[torch.from_numpy(document.label_head != LabelHead.none)]


def batches_of_equal_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the items in batches of at most `batch_size`, all of a batch equally long."""
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, []).append(number)
    for length in sorted(by_length):
        numbers = by_length[length]
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


def load_trained(checkpoint_dir: Path, device: torch.device | str = "cpu", *, averaged: bool = False) -> InferenceModel:
    """The model of a step directory, ready to generate; `averaged` takes the moving average of its weights.

    Raises:
        UserError: not a checkpoint of a Janus, damaged, saved without its tokenizers, or without an average.
    """
    return InferenceModel(open_trained(Path(checkpoint_dir), averaged=averaged), device)
