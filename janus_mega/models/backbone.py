"""The shared transformer as megatron-core sees it: config, layer spec, block, rotary angles.

The only file that spells megatron-core's field names. Layers are megatron's own (column- and row-parallel linears,
SwiGLU MLP, residual handling, recomputation); the norm and the core attention are ours. Modules are created without
initialisation: `models.init` fills every parameter by its global name, so the same weights come out of any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from janus_mega.config.schema import BackboneConfig, ParallelConfig, Precision, Recompute
from janus_mega.models.attention import DocumentAttention
from janus_mega.models.fp32_sums import ColumnParallel, RowParallel
from janus_mega.models.norm import RMSNorm
from janus_mega.parallel.layout import ChunkPlace


@dataclass
class BlockConfig(TransformerConfig):
    """megatron's configuration and what our own layers want to know beyond it."""

    tp_sums_in_fp32: bool = False
    """See `fp32_sums`."""


def compute_dtype(parallel: ParallelConfig) -> torch.dtype:
    """What the layers compute in."""
    return torch.bfloat16 if parallel.precision == Precision.bf16 else torch.float32


def transformer_config(
    backbone: BackboneConfig, parallel: ParallelConfig, layer_counts: Sequence[int] = ()
) -> BlockConfig:
    """megatron's configuration of our backbone and layout; `layer_counts` as `derive.layer_counts` gives them (equal
    shares if left out)."""
    is_interleaved = parallel.virtual_pp_size > 1
    dtype = compute_dtype(parallel)
    recompute: dict[Recompute, dict[str, Any]] = {
        Recompute.none: {},
        Recompute.selective: {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        Recompute.full: {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return BlockConfig(
        num_layers=backbone.num_layers,
        hidden_size=backbone.hidden_size,
        num_attention_heads=backbone.num_heads,
        num_query_groups=backbone.num_kv_heads,
        ffn_hidden_size=backbone.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=backbone.norm_eps,
        qk_layernorm=backbone.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pp_size if is_interleaved else None,
        pipeline_model_parallel_layout=_megatron_pipeline(layer_counts)
        if parallel.pp_size > 1 and layer_counts
        else None,
        # Interleaving sends and receives in one batch only where pipelines have more than two ranks: with two, messages
        # of both directions meet and are silently exchanged.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        # The host need not wait after a message, as for torch 1, whose requests could miss the batch (pytorch#82450):
        # they hold up the stream, and in its order what came is used and what was sent is freed.
        batch_p2p_sync=False,
        sequence_parallel=parallel.sequence_parallel,
        tp_sums_in_fp32=parallel.tp_sums_in_fp32,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Plain `torch.empty` allocations, so that construction obeys `torch.device("meta")`.
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # What was sent is freed at once, except where gloo may still be reading it (on CUDA, streams keep the order).
        deallocate_pipeline_outputs=not is_interleaved or torch.cuda.is_available(),
        **recompute[parallel.recompute],
    )


def _megatron_pipeline(layer_counts: Sequence[int]) -> list[list[str]]:
    """What each chunk holds, in megatron's words and in the order of the stream."""
    chunks = [["decoder"] * count for count in layer_counts]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def _layer_spec(qk_norm: bool) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_norm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    mlp = layer.mlp.submodules
    attention.linear_qkv = mlp.linear_fc1 = ColumnParallel
    attention.linear_proj = mlp.linear_fc2 = RowParallel
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = DocumentAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def build_decoder(config: TransformerConfig, place: ChunkPlace, chunk_no: int = 0) -> TransformerBlock:
    """A chunk's layers; the last chunk also holds the final norm. Needs megatron's groups to exist."""
    submodules = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config.qk_layernorm)] * len(place.layers), layer_norm=RMSNorm
    )
    is_interleaved = config.virtual_pipeline_model_parallel_size is not None
    return TransformerBlock(
        config,
        submodules,
        pre_process=place.is_first,
        post_process=place.is_last,
        vp_stage=chunk_no if is_interleaved else None,
    )


def compile_layers(decoder: TransformerBlock) -> None:
    """Compiles each layer in place with torch.compile; names of parameters stay.

    Attention stays outside: its documents differ from batch to batch in number and length, and it is one kernel
    already. What is compiled sees [s, b, h] alone, so no batch makes it compile again.
    """
    for layer in decoder.layers:
        attention = layer.self_attention.core_attention
        attention.forward = torch.compiler.disable(attention.forward)
        layer.compile()


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles of rotary position embedding (RoFormer, arXiv 2104.09864), position * theta^(-2i/d).

    Args:
        position_ids: int64 [s, b], restarting with every document.

    Returns:
        fp32 [s, b, 1, head_dim], both halves alike (the half-split convention of Llama).
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids.float()[..., None] * theta**-exponents  # [s, b, d / 2]
    return torch.cat((angles, angles), dim=-1).unsqueeze(2)
