"""A whole Janus in one forked rank, with weights that hide nothing, for comparison with other implementations."""

from collections.abc import Mapping

import torch
from torch import Tensor

from janus_mega.config.schema import LossConfig, ModelConfig
from janus_mega.models.init import initial_value
from janus_mega.models.janus import JanusChunk, build_chunks
from janus_mega.models.sharding import sharded_parameters
from janus_mega.parallel.groups import build_groups
from tests.support.tiny import fp32


def lively_weights(name: str, shape: tuple[int, ...], model: ModelConfig) -> Tensor:
    """An initial value, larger, and with norms and biases that are neither ones nor zeros."""
    value = initial_value(name, shape, model.backbone, seed=0)
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    if len(shape) == 1:
        return value + 0.3 * torch.randn(shape, generator=generator)
    return value * 3 if name.startswith(("decoder.", "text_")) else value


def whole_chunk(model: ModelConfig, chunk_tokens: int = 4096) -> tuple[JanusChunk, dict[str, torch.nn.Parameter]]:
    """A chunk with lively weights that holds everything, and its parameters by global name. Call it in a lone rank."""
    groups = build_groups(tp_size=1, pp_size=1)
    (chunk,) = build_chunks(model, fp32(), LossConfig(chunk_tokens=chunk_tokens), groups.layout)
    chunk.to_empty(device=groups.device)
    chunk.set_input_tensor([None])
    parameters = {}
    for shard in sharded_parameters([chunk], groups.layout):
        with torch.no_grad():
            shard.parameter.copy_(lively_weights(shard.name, shard.global_shape, model))
        parameters[shard.name] = shard.parameter
    return chunk, parameters


def plain(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values alone."""
    return {name: value.detach().clone() for name, value in parameters.items()}
