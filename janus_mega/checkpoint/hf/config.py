"""Configuration files of a Hugging Face Janus directory, from our model configuration.

Written field by field rather than by the library's `save_pretrained`: files then hold what both major versions of
transformers read, not what the installed one happens to write. What is easy to get wrong and why it stands here:

* `tie_word_embeddings` false at the top and in `text_config`: the top level defaults to true, Janus is untied.
* `rope_theta` beside `rope_parameters`: version 4 reads the first, version 5 the second.
* `generation_kwargs.boi_token_id` in the generation config, where version 5 looks for it.
* mean and deviation 0.5 for the image processor, whose own defaults are CLIP's.
* preprocessor_config.json beside processor_config.json: version 4 reads image settings from the first alone.
"""

from typing import Any

from data_pipeline import dialogue
from data_pipeline.errors import UserError
from data_pipeline.spec import Template
from data_pipeline.text import special
from janus_mega.config import derive
from janus_mega.config.schema import ModelConfig

GUIDANCE_SCALE = 5.0
"""Classifier-free guidance of Janus's own examples; the default of exports."""


def check_expressible(model: ModelConfig) -> None:
    """Refuses what transformers' Janus classes cannot be.

    Raises:
        UserError: naming the option and the value it must have.
    """
    backbone = model.backbone
    if backbone.qk_norm:
        raise UserError(
            "model.backbone.qk_norm true: the Hugging Face Janus has no such norm; train with false to export"
        )
    if model.understanding.name != "siglip":
        raise UserError(
            f"model.understanding.name {model.understanding.name!r}: the Hugging Face Janus has a siglip encoder only"
        )
    if derive.image_head_hidden_size(model) != backbone.hidden_size:
        raise UserError(
            f"model.image_head_hidden_size {model.image_head_hidden_size}: the Hugging Face Janus has an image head of "
            f"the backbone's width; train with {backbone.hidden_size} or 0 to export"
        )
    grids = derive.understanding_grid(model.understanding), derive.generation_grid(model.image_tokenizer)
    if grids[0] != grids[1]:
        raise UserError(
            f"model: understood images are {grids[0]}x{grids[0]} tokens and drawn ones {grids[1]}x{grids[1]}; the "
            "Hugging Face Janus draws as many as it understands, choose equal grids to export"
        )


def model_config(model: ModelConfig, ids: dialogue.SpecialIds, dtype: str = "float32") -> dict[str, Any]:
    """Content of config.json."""
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "dtype": dtype,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "image_token_id": ids.image_placeholder,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "text_config": {**_text_config(model, ids), "dtype": dtype, "torch_dtype": dtype},
        "vision_config": _vision_config(model),
        "vq_config": _vq_config(model),
    }


def _text_config(model: ModelConfig, ids: dialogue.SpecialIds) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": backbone.vocab_size,
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.ffn_hidden_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_kv_heads,
        "head_dim": derive.head_dim(backbone),
        "hidden_act": "silu",
        "max_position_embeddings": backbone.max_position_embeddings,
        "rms_norm_eps": backbone.norm_eps,
        "rope_theta": backbone.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "use_cache": True,
    }


def _vision_config(model: ModelConfig) -> dict[str, Any]:
    encoder = model.understanding
    return {
        "model_type": "janus_vision_model",
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "mlp_ratio": encoder.mlp_ratio,
        "layer_norm_eps": encoder.norm_eps,
        "hidden_act": "gelu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout_rate": 0.0,
        "projection_dropout": 0.0,
        "use_qk_norm": False,
        "projection_dim": model.backbone.hidden_size,
        "depth": 2,
        "num_image_tokens": derive.understanding_tokens(encoder),
    }


def _vq_config(model: ModelConfig) -> dict[str, Any]:
    tokenizer = model.image_tokenizer
    return {
        "model_type": "janus_vqgan",
        "embed_dim": tokenizer.code_dim,
        "num_embeddings": tokenizer.codebook_size,
        "double_latent": False,
        "latent_channels": tokenizer.latent_channels,
        "in_channels": 3,
        "out_channels": 3,
        "base_channels": tokenizer.base_channels,
        "channel_multiplier": list(tokenizer.channel_multiplier),
        "num_res_blocks": tokenizer.num_res_blocks,
        "num_patches": derive.generation_grid(tokenizer),
        "dropout": 0.0,
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
        "projection_dim": model.backbone.hidden_size,
        "image_token_embed_dim": model.backbone.hidden_size,
    }


def generation_config(ids: dialogue.SpecialIds) -> dict[str, Any]:
    """Content of generation_config.json."""
    return {
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "guidance_scale": GUIDANCE_SCALE,
        "generation_kwargs": {"boi_token_id": ids.begin_of_image},
    }


def preprocessor_config(model: ModelConfig) -> dict[str, Any]:
    """Content of preprocessor_config.json."""
    side = model.understanding.image_size
    return {
        "image_processor_type": "JanusImageProcessor",
        "processor_class": "JanusProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "min_size": min(14, side),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
        "do_convert_rgb": True,
    }


def processor_config(model: ModelConfig, *, use_default_system_prompt: bool) -> dict[str, Any]:
    """Content of processor_config.json."""
    return {
        "processor_class": "JanusProcessor",
        "num_image_tokens": derive.understanding_tokens(model.understanding),
        "use_default_system_prompt": use_default_system_prompt,
    }


def chat_template(template: Template) -> str:
    """Content of chat_template.jinja: chat messages as `dialogue.question_pieces` and `generation_pieces` render them.

    An image becomes the placeholder and a newline; an answer is followed by eos, a system message by an empty line.
    """
    opening, closing = dialogue.pieces_text(dialogue.question_pieces(template, "question")).split("question")
    filled = _CHAT_TEMPLATE.replace("@USER@", opening.removesuffix(": "))
    filled = filled.replace("@ASSISTANT@", closing.strip().removesuffix(":"))
    return filled.replace("@IMAGE@", special.IMAGE_PLACEHOLDER).replace("@EOS@", special.EOS)


_CHAT_TEMPLATE = """\
{%- macro content_of(message) -%}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '@IMAGE@\\n' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ content_of(message) + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '@USER@: ' + content_of(message) + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '@ASSISTANT@: ' + content_of(message) + '@EOS@' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '@ASSISTANT@:' }}
{%- endif -%}
"""
