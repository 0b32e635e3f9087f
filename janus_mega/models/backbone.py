"""The shared transformer as megatron-core sees it: config, layer spec, block, rotary angles.

The only file that spells megatron-core's field names. Layers are megatron's own (column- and row-parallel linears,
SwiGLU MLP, residual handling, recomputation); the norm and the core attention are ours. Modules are created without
initialisation: `models.init` fills every parameter by its global name, so the same weights come out of any layout.
"""

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
from janus_mega.models.norm import RMSNorm
from janus_mega.parallel.layout import Layout, layer_range


def transformer_config(backbone: BackboneConfig, parallel: ParallelConfig) -> TransformerConfig:
    """megatron's configuration of our backbone and layout."""
    dtype = torch.bfloat16 if parallel.precision == Precision.bf16 else torch.float32
    recompute: dict[Recompute, dict[str, Any]] = {
        Recompute.none: {},
        Recompute.selective: {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        Recompute.full: {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return TransformerConfig(
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
        sequence_parallel=parallel.sequence_parallel,
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
        deallocate_pipeline_outputs=True,
        **recompute[parallel.recompute],
    )


def _layer_spec(qk_norm: bool) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_norm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = DocumentAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def build_decoder(config: TransformerConfig, layout: Layout) -> TransformerBlock:
    """This pipeline rank's layers; the last rank also holds the final norm. Needs megatron's groups to exist."""
    num_layers = len(layer_range(config.num_layers, layout.pp_size, layout.pp_rank))
    submodules = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config.qk_layernorm)] * num_layers, layer_norm=RMSNorm
    )
    return TransformerBlock(
        config,
        submodules,
        pre_process=layout.is_first_pp_rank,
        post_process=layout.is_last_pp_rank,
    )


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
