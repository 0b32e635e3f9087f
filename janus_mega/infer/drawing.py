"""The loop that draws: image ids one by one under classifier-free guidance.

Each image runs in two rows, one that sees its prompt and one whose prompt is pads between bos and begin-of-image. The
pads are attended to and take positions like any token, because training dropped prompts exactly so. The next input is
the adaptor over the embedding of the id just chosen; no end of image is ever asked for.

Many requests repeat a prompt, and the unconditional prompt is the same for all of one length: each different prompt
goes through the transformer once and its cache is copied to the rows that need it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from janus_mega.infer.sampling import choose


@dataclass(frozen=True, slots=True)
class DrawingRequest:
    """Images that are drawn together."""

    prompts: Tensor
    """int64 [b, n], equally long, each ending in begin-of-image."""
    unconditional: Tensor
    """int64 [n], the prompt of the unconditional rows."""
    noise: Tensor
    """[b, tokens] uniform numbers, one per choice."""


def draw_ids(
    network: JanusForConditionalGeneration, request: DrawingRequest, *, guidance_scale: float, temperature: float
) -> Tensor:
    """Image ids int64 [b, tokens] in raster order, on the network's device."""
    language_model = network.model.language_model
    num_images, num_tokens = request.noise.shape
    guided = guidance_scale != 1.0
    distinct, row_of = request.prompts.unique(dim=0, return_inverse=True)
    if guided:
        distinct = torch.cat([distinct, request.unconditional[None]])
        row_of = torch.cat([row_of, row_of.new_full((num_images,), distinct.shape[0] - 1)])
    cache = DynamicCache(config=network.config.text_config)
    hidden = language_model(
        inputs_embeds=language_model.embed_tokens(distinct), past_key_values=cache, use_cache=True
    ).last_hidden_state[row_of, -1]  # [b or 2 b, h]
    cache.batch_select_indices(row_of)
    ids = torch.empty(num_images, num_tokens, dtype=torch.long, device=hidden.device)
    for step in range(num_tokens):
        logits = network.model.generation_head(hidden).float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance_scale * (conditional - unconditional)
        chosen = choose(logits, temperature, request.noise[:, step])
        ids[:, step] = chosen
        if step + 1 < num_tokens:
            stream = network.prepare_embeddings_for_image_generation(chosen)  # [b, h]
            stream = stream.repeat(2, 1) if guided else stream
            hidden = language_model(
                inputs_embeds=stream[:, None], past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
    return ids
