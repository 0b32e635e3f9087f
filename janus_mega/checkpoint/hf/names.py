"""Our weights <-> transformers' `JanusForConditionalGeneration`: the table of names.

The image tokenizer's weights stand under `image_tokenizer.` on our side (VQ-16's state-dict names behind it); in a
training checkpoint they are a file of their own.
"""

from janus_mega.checkpoint.name_map import HALVES, QKV, UNIT_ROWS, Row, row

IMAGE_TOKENIZER_PREFIX = "image_tokenizer."

_OUR_LAYER = "decoder.layers.{n}"
_LAYER = "model.language_model.layers.{n}"
BACKBONE_ROWS: tuple[Row, ...] = (
    row("text_embedding.weight", "model.language_model.embed_tokens.weight"),
    row(f"{_OUR_LAYER}.input_layernorm.weight", f"{_LAYER}.input_layernorm.weight"),
    row(
        f"{_OUR_LAYER}.self_attention.linear_qkv.weight",
        tuple(f"{_LAYER}.self_attn.{part}_proj.weight" for part in "qkv"),
        QKV,
    ),
    row(f"{_OUR_LAYER}.self_attention.linear_proj.weight", f"{_LAYER}.self_attn.o_proj.weight"),
    row(f"{_OUR_LAYER}.pre_mlp_layernorm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
    row(
        f"{_OUR_LAYER}.mlp.linear_fc1.weight",
        tuple(f"{_LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up")),
        HALVES,
    ),
    row(f"{_OUR_LAYER}.mlp.linear_fc2.weight", f"{_LAYER}.mlp.down_proj.weight"),
    row("decoder.final_layernorm.weight", "model.language_model.norm.weight"),
    row("text_head.weight", "lm_head.weight"),
)
"""The Llama part."""

_OUR_ENCODER = "understanding_encoder"
_ENCODER = "model.vision_model"
UNDERSTANDING_ROWS: tuple[Row, ...] = (
    *(
        row(f"{_OUR_ENCODER}.{name}", f"{_ENCODER}.{name}")
        for name in (
            "embeddings.patch_embedding.{p}",
            "embeddings.position_embedding.weight",
            "encoder.layers.{n}.layer_norm1.{p}",
            "encoder.layers.{n}.self_attn.q_proj.{p}",
            "encoder.layers.{n}.self_attn.k_proj.{p}",
            "encoder.layers.{n}.self_attn.v_proj.{p}",
            "encoder.layers.{n}.self_attn.projection_layer.{p}",
            "encoder.layers.{n}.layer_norm2.{p}",
            "encoder.layers.{n}.mlp.fc1.{p}",
            "encoder.layers.{n}.mlp.fc2.{p}",
            "post_layernorm.{p}",
        )
    ),
    row("understanding_adaptor.fc1.{p}", "model.aligner.fc1.{p}"),
    row("understanding_adaptor.fc2.{p}", "model.aligner.hidden_layers.0.{p}"),
)
"""SigLIP and its adaptor."""

GENERATION_ROWS: tuple[Row, ...] = (
    row("generation_embedding.weight", "model.generation_embeddings.weight"),
    row("generation_adaptor.fc1.{p}", "model.generation_aligner.fc1.{p}"),
    row("generation_adaptor.fc2.{p}", "model.generation_aligner.hidden_layers.0.{p}"),
    row("image_head.fc1.{p}", "model.generation_head.proj_out.{p}"),
    row("image_head.fc2.{p}", "model.generation_head.vision_head.{p}"),
)
"""Embedding, adaptor and head of image ids."""


def _tokenizer_rows() -> tuple[Row, ...]:
    rows = []
    for side, levels, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        ours, theirs = f"{IMAGE_TOKENIZER_PREFIX}{side}", f"model.vqmodel.{side}"
        rows += [row(f"{ours}.{name}.{{p}}", f"{theirs}.{name}.{{p}}") for name in ("conv_in", "norm_out", "conv_out")]
        for number, name in enumerate(("block_1", "attn_1", "block_2")):
            rows.append(row(f"{ours}.mid.{number}.{{part}}.{{p}}", f"{theirs}.mid.{name}.{{part}}.{{p}}"))
        level = f"{ours}.conv_blocks.{{i}}"
        rows.append(row(f"{level}.res.{{j}}.{{part}}.{{p}}", f"{theirs}.{levels}.{{i}}.block.{{j}}.{{part}}.{{p}}"))
        rows.append(row(f"{level}.attn.{{j}}.{{part}}.{{p}}", f"{theirs}.{levels}.{{i}}.attn.{{j}}.{{part}}.{{p}}"))
        rows.append(row(f"{level}.{resample}.conv.{{p}}", f"{theirs}.{levels}.{{i}}.{resample}.conv.{{p}}"))
    for name in ("quant_conv", "post_quant_conv"):
        rows.append(row(f"{IMAGE_TOKENIZER_PREFIX}{name}.{{p}}", f"model.vqmodel.{name}.{{p}}"))
    # transformers' quantiser compares without normalising, so only unit rows give it the ids that we trained on.
    codebook = "quantize.embedding.weight"
    rows.append(row(f"{IMAGE_TOKENIZER_PREFIX}{codebook}", f"model.vqmodel.{codebook}", UNIT_ROWS))
    return tuple(rows)


IMAGE_TOKENIZER_ROWS: tuple[Row, ...] = _tokenizer_rows()
"""VQ-16."""

HF_ROWS: tuple[Row, ...] = (*BACKBONE_ROWS, *UNDERSTANDING_ROWS, *GENERATION_ROWS, *IMAGE_TOKENIZER_ROWS)
"""The whole table."""
