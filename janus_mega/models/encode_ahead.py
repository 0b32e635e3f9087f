"""The frozen understanding encoder, run for all micro-batches of a step before the first of them.

A micro-batch of one row carries a few images; a whole step carries enough to fill a device. Frozen features need no
graph, so nothing but the features themselves is kept until their micro-batch comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from janus_mega.config.schema import Module, ParallelConfig
from janus_mega.models.janus import JanusChunk
from janus_mega.models.placement import PlacedBatch
from janus_mega.models.vision.siglip import normalize_pixels


@torch.no_grad()
def encode_ahead(chunk: JanusChunk, batches: Sequence[PlacedBatch], images_at_a_time: int) -> list[PlacedBatch]:
    """The micro-batches with `understanding_features`; one without images gets zeros for its dummy image.

    Args:
        chunk: the pipeline's first, with a frozen encoder; another is handed its batches back.
        batches: all micro-batches of a step.
        images_at_a_time: images per call of the encoder, at most.

    Collective over: tp, where images are dealt over it.
    """
    if not chunk.place.is_first:
        return list(batches)
    encoder, dtype = chunk.understanding_encoder, chunk.config.params_dtype
    pixels = torch.cat([batch.pixel_values for batch in batches])

    def encode(images: Tensor) -> Tensor:
        return torch.cat([encoder(normalize_pixels(part, dtype)) for part in images.split(images_at_a_time)])

    dummy = torch.zeros(1, encoder.num_tokens, encoder.hidden_size, dtype=dtype, device=pixels.device)
    features = chunk.dealt(Module.understanding_encoder, encode, pixels) if pixels.shape[0] else dummy[:0]
    shares = features.split([batch.pixel_values.shape[0] for batch in batches])
    return [
        replace(batch, understanding_features=share if share.shape[0] else dummy)
        for batch, share in zip(batches, shares, strict=True)
    ]


def prepare_with(chunk: JanusChunk, parallel: ParallelConfig) -> Callable[[Sequence[PlacedBatch]], list[PlacedBatch]]:
    """What is done to a step's micro-batches before its schedule: encoding as configured, or nothing."""
    if not parallel.encode_ahead:
        return list
    return partial(encode_ahead, chunk, images_at_a_time=parallel.encode_ahead)
