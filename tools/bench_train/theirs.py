"""transformers' JanusForConditionalGeneration trained by torch's AdamW.

The library has no loss for image generation, so it is written here with the library's own modules: ids through
`prepare_embeddings_for_image_generation`, image head, cross entropy. Text is scored with `lm_head`. Both heads score
labelled positions only, which is kinder to the library than its own forward pass; `every_position` scores text at all
positions with ignored labels, as that forward pass does.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.dialogue import SpecialIds
from data_pipeline.schema import LabelHead, TokenKind
from janus_mega.checkpoint.hf.config import model_config
from janus_mega.checkpoint.hf.names import BACKBONE_ROWS, GENERATION_ROWS, UNDERSTANDING_ROWS
from janus_mega.checkpoint.name_map import convert, plan_export
from janus_mega.checkpoint.trained import heads_of
from janus_mega.config.schema import ModelConfig, OptimizerConfig
from janus_mega.models.vision.siglip import normalize_pixels

_IDS = SpecialIds(bos=0, eos=1, pad=2, image_placeholder=2, begin_of_image=0, end_of_image=1)
_NEGATIVE = -1e9


class TheirTraining:
    """Model, optimizer, step."""

    def __init__(self, model: ModelConfig, weights: dict[str, Tensor], optimizer: OptimizerConfig) -> None:
        """Takes our weights by their global names."""
        from transformers.models.janus.configuration_janus import JanusConfig
        from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

        self.model = JanusForConditionalGeneration(JanusConfig.from_dict(model_config(model, _IDS)))
        rows = (*BACKBONE_ROWS, *UNDERSTANDING_ROWS, *GENERATION_ROWS)
        state = dict(convert(plan_export(rows, weights), weights.__getitem__, heads_of(model)))
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or any(not name.startswith("model.vqmodel.") for name in missing):
            raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        self.model.model.vqmodel.requires_grad_(False)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        betas = (optimizer.beta1, optimizer.beta2)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optimizer.lr, betas=betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        self.clip = optimizer.clip_grad_norm

    def step(self, batches: Sequence[dict[str, Tensor]], *, every_position: bool = False) -> float:
        """One update over the batches; returns the mean loss of all labels."""
        labels = sum(int((batch["label_head"] != LabelHead.none).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.loss_sum(batch, every_position=every_position) / labels
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def loss_sum(self, batch: dict[str, Tensor], *, every_position: bool = False) -> Tensor:
        """Sum of cross entropies of a Batch, packed or padded."""
        janus = self.model.model
        kind, ids = batch["token_kind"], batch["input_ids"]
        understood, drawn = kind == int(TokenKind.image_und), kind == int(TokenKind.image_gen)
        stream = janus.language_model.embed_tokens(torch.where(understood | drawn, 0, ids))
        if len(batch["pixel_values"]):
            features = janus.get_image_features(normalize_pixels(batch["pixel_values"]), return_dict=True)
            stream = stream.masked_scatter(understood.unsqueeze(-1), features.pooler_output)
        if drawn.any():
            embedded = self.model.prepare_embeddings_for_image_generation(ids[drawn])
            stream = stream.masked_scatter(drawn.unsqueeze(-1), embedded)
        hidden = janus.language_model(inputs_embeds=stream, use_cache=False, **_attention(batch)).last_hidden_state
        return self._score(hidden, batch, every_position)

    def _score(self, hidden: Tensor, batch: dict[str, Tensor], every_position: bool) -> Tensor:
        head, labels = batch["label_head"], batch["labels"]
        is_text, is_image = head == int(LabelHead.text), head == int(LabelHead.image)
        total = hidden.new_zeros(())
        if every_position:
            logits = self.model.lm_head(hidden).flatten(0, 1).float()
            total = total + F.cross_entropy(logits, torch.where(is_text, labels, -100).flatten(), reduction="sum")
        elif is_text.any():
            total = total + F.cross_entropy(self.model.lm_head(hidden[is_text]), labels[is_text], reduction="sum")
        if is_image.any():
            logits = self.model.model.generation_head(hidden[is_image])
            total = total + F.cross_entropy(logits, labels[is_image], reduction="sum")
        return total


def _attention(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Padded batches: the 2-d mask. Packed rows: positions that restart, and a block-diagonal causal mask."""
    if "attention_mask" in batch:
        return {"attention_mask": batch["attention_mask"]}
    num_rows, seq_len = batch["input_ids"].shape
    borders = batch["cu_seqlens"].long()
    segment = torch.bucketize(torch.arange(num_rows * seq_len), borders[1:], right=True).view(num_rows, seq_len)
    allowed = (segment[:, :, None] == segment[:, None, :]).tril()
    mask = torch.where(allowed, 0.0, _NEGATIVE).unsqueeze(1)
    return {"attention_mask": mask, "position_ids": batch["position_ids"]}
