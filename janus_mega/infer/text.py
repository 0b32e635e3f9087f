"""The loop that writes text, token by token, over a key-value cache."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from janus_mega.infer.sampling import choose


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a text continues."""

    input_ids: np.ndarray
    """int32 [n], images as whole blocks of placeholders."""
    images: tuple[np.ndarray, ...] = ()
    """uint8 [3, side, side] in the order of their blocks."""


def write_text(
    network: JanusForConditionalGeneration, embedded: Tensor, eos: int, noise: Tensor, temperature: float
) -> list[list[int]]:
    """Continues rows of equal length; finished rows leave the batch.

    Args:
        network: the model.
        embedded: prompts [b, n, h].
        eos: id that ends a row; it is part of the result.
        noise: uniform numbers [b, max_new_tokens], one per choice.
        temperature: see `sampling.choose`.
    """
    cache = DynamicCache(config=network.config.text_config)
    written: list[list[int]] = [[] for _ in range(embedded.shape[0])]
    alive = torch.arange(embedded.shape[0])
    stream = embedded
    for step in range(noise.shape[1]):
        hidden = network.model.language_model(
            inputs_embeds=stream, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        ids = choose(network.lm_head(hidden).float(), temperature, noise[alive, step])
        for row, token in zip(alive.tolist(), ids.tolist(), strict=True):
            written[row].append(token)
        going_on = (ids != eos).cpu()
        if not going_on.all():
            kept = torch.nonzero(going_on)[:, 0]
            if kept.numel() == 0:
                break
            cache.batch_select_indices(kept.to(ids.device))
            alive, ids = alive[kept], ids[kept.to(ids.device)]
        stream = network.model.language_model.embed_tokens(ids)[:, None]  # [b, 1, h]
    return written
