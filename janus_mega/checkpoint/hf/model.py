"""transformers' Janus from our weights, in memory: what inference runs and exports are checked against."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.models.janus.configuration_janus import JanusConfig
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from data_pipeline.errors import UserError
from janus_mega.checkpoint.hf import config as hf_config
from janus_mega.checkpoint.hf.names import HF_ROWS
from janus_mega.checkpoint.name_map import convert, plan_export
from janus_mega.checkpoint.trained import TrainedModel, heads_of


def hf_weights(trained: TrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight under its Hugging Face name, in the checkpoint's number format, one group in memory.

    Raises:
        UserError: the model has something that the Hugging Face classes cannot express, or names do not fit the map.
    """
    hf_config.check_expressible(trained.model)
    return convert(plan_export(HF_ROWS, trained.names), trained.read, heads_of(trained.model))


def hf_model_config(trained: TrainedModel, dtype: str = "float32") -> dict[str, Any]:
    """Content of config.json for a checkpoint."""
    return hf_config.model_config(trained.model, trained.special_ids, dtype)


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the Hugging Face model of this configuration has."""
    with torch.device("meta"):
        model = JanusForConditionalGeneration(JanusConfig.from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(
    weights: Iterable[tuple[str, Tensor]], expected: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on and sees that each expected tensor comes exactly once in its shape.

    Raises:
        UserError: naming the first tensor that is unknown, of another shape, or missing at the end.
    """
    missing = dict(expected)
    for name, tensor in weights:
        shape = missing.pop(name, None)
        if shape != tuple(tensor.shape):
            raise UserError(
                f"tensor {name}: shape {list(tensor.shape)}, its configuration asks for "
                f"{'no such tensor' if shape is None else list(shape)}; the weights are of another model"
            )
        yield name, tensor
    if missing:
        raise UserError(f"tensor {next(iter(missing))}: missing ({len(missing)} in all); the weights are not whole")


def build_hf_model(trained: TrainedModel) -> JanusForConditionalGeneration:
    """The checkpoint as a Hugging Face model on the CPU, in evaluation mode, without a file in between."""
    config = hf_model_config(trained)
    weights = dict(check_shapes(hf_weights(trained), expected_shapes(config)))
    with no_init_weights():
        model = JanusForConditionalGeneration(JanusConfig.from_dict(config))
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)
