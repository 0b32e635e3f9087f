"""A Hugging Face Janus directory as our weights: the mirror of `export`, through the same table of names.

Only safetensors and JSON are read; classes named in files are never looked up.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.hf.names import HF_ROWS, IMAGE_TOKENIZER_PREFIX
from janus_mega.checkpoint.name_map import convert, plan_import
from janus_mega.checkpoint.trained import heads_of
from janus_mega.config.schema import BackboneConfig, EncoderConfig, ImageTokenizerConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A Janus from elsewhere under our names."""

    model: ModelConfig
    weights: dict[str, Tensor]
    """By global name, in the file's number format."""
    image_tokenizer_weights: dict[str, Tensor]
    """VQ-16's state dict."""


def import_hf(directory: Path) -> ImportedModel:
    """Reads a Hugging Face Janus directory.

    Raises:
        UserError: a file is missing, the architecture is another, or tensors do not fit the map of names.
    """
    directory = Path(directory)
    model = model_from_hf(_read_json(directory / "config.json"), directory)
    names, read = _open_weights(directory)
    weights: dict[str, Tensor] = {}
    image_tokenizer: dict[str, Tensor] = {}
    for name, tensor in convert(plan_import(HF_ROWS, names), read, heads_of(model)):
        if name.startswith(IMAGE_TOKENIZER_PREFIX):
            image_tokenizer[name.removeprefix(IMAGE_TOKENIZER_PREFIX)] = tensor
        else:
            weights[name] = tensor
    return ImportedModel(model, weights, image_tokenizer)


def model_from_hf(config: dict[str, Any], directory: Path) -> ModelConfig:
    """Our architecture from the content of config.json; absent fields take the library's defaults."""
    if config.get("model_type") != "janus":
        raise UserError(
            f"{directory}/config.json: model_type {config.get('model_type')!r} is not 'janus'; give a Janus"
        )
    text, vision, vq = (config.get(part) or {} for part in ("text_config", "vision_config", "vq_config"))
    num_heads = text.get("num_attention_heads", 32)
    image_size = vision.get("image_size", 384)
    multiplier = list(vq.get("channel_multiplier", (1, 1, 2, 2, 4)))
    grid = image_size // vision.get("patch_size", 16)
    rope = text.get("rope_parameters") or {}
    backbone = BackboneConfig(
        hidden_size=text.get("hidden_size", 4096),
        num_layers=text.get("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads") or num_heads,
        ffn_hidden_size=text.get("intermediate_size", 11008),
        vocab_size=text.get("vocab_size", 32000),
        max_position_embeddings=text.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        norm_eps=text.get("rms_norm_eps", 1e-6),
    )
    return ModelConfig(
        name=directory.name,
        backbone=backbone,
        understanding=EncoderConfig(
            image_size=image_size,
            patch_size=vision.get("patch_size", 16),
            hidden_size=vision.get("hidden_size", 1024),
            num_layers=vision.get("num_hidden_layers", 24),
            num_heads=vision.get("num_attention_heads", 16),
            mlp_ratio=float(vision.get("mlp_ratio", 4.0)),
            norm_eps=vision.get("layer_norm_eps", 1e-6),
        ),
        image_tokenizer=ImageTokenizerConfig(
            image_size=grid * 2 ** (len(multiplier) - 1),
            base_channels=vq.get("base_channels", 128),
            channel_multiplier=multiplier,
            num_res_blocks=vq.get("num_res_blocks", 2),
            latent_channels=vq.get("latent_channels", 256),
            codebook_size=vq.get("num_embeddings", 16384),
            code_dim=vq.get("embed_dim", 8),
        ),
    )


def _open_weights(directory: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Names of all tensors, and a function that reads one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    places: dict[str, Any] = {}
    for file in files:
        path = directory / file
        if path.parent != directory or not path.is_file():
            raise UserError(f"{path}: missing; a Hugging Face directory with safetensors weights is needed")
        handle = safe_open(path, framework="pt")
        places |= dict.fromkeys(handle.keys(), handle)
    return list(places), lambda name: places[name].get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a Hugging Face directory") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; download the directory again") from None
    return content
