"""What we ask of megatron-core is there, and is asked for."""

import ast
import inspect
from dataclasses import fields

import pytest
import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from janus_mega.config.schema import ParallelConfig, Precision, Recompute
from janus_mega.models import backbone
from janus_mega.models.attention import DocumentAttention
from janus_mega.models.fp32_sums import ColumnParallel, RowParallel
from janus_mega.models.norm import RMSNorm
from tests.support.tiny import fp32, tiny_model


def names_used() -> set[str]:
    """Keywords of our call of megatron's configuration but our own, and keys of the recompute table."""
    tree = ast.parse(inspect.getsource(backbone.transformer_config))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    (call,) = (node for node in calls if getattr(node.func, "id", "") == "BlockConfig")
    keywords = {keyword.arg for keyword in call.keywords if keyword.arg} - {"tp_sums_in_fp32"}
    tables = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = {key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)}
    return keywords | keys


def test_every_megatron_field_we_use_exists() -> None:
    used = names_used()
    assert len(used) > 25
    assert {"recompute_granularity", "recompute_modules", "sequence_parallel"} <= used
    assert used - {field.name for field in fields(TransformerConfig)} == set()


@pytest.mark.parametrize("virtual_pp_size", [1, 2])
def test_no_message_between_pipeline_ranks_waits_for_the_device(virtual_pp_size: int) -> None:
    config = backbone.transformer_config(tiny_model().backbone, fp32(1, 2, virtual_pp_size=virtual_pp_size))
    assert (config.batch_p2p_comm, config.batch_p2p_sync) == (virtual_pp_size == 1, False)


def test_the_block_takes_what_we_pass() -> None:
    parameters = inspect.signature(TransformerBlock.forward).parameters
    assert {"hidden_states", "attention_mask", "rotary_pos_emb", "packed_seq_params"} <= set(parameters)
    assert {"pre_process", "post_process"} <= set(inspect.signature(TransformerBlock.__init__).parameters)


def test_configuration_carries_our_values() -> None:
    model = tiny_model(qk_norm=True).backbone
    config = backbone.transformer_config(model, fp32(2, 2, sequence_parallel=True))
    assert (config.hidden_size, config.num_layers, config.num_attention_heads) == (64, 4, 4)
    assert (config.num_query_groups, config.kv_channels, config.ffn_hidden_size) == (2, 16, 128)
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (2, 2)
    assert config.sequence_parallel and config.qk_layernorm and config.gated_linear_unit
    assert config.layernorm_epsilon == model.norm_eps
    assert not config.add_bias_linear
    assert config.hidden_dropout == config.attention_dropout == 0.0


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(precision: str, dtype: torch.dtype) -> None:
    config = backbone.transformer_config(tiny_model().backbone, ParallelConfig(precision=Precision(precision)))
    assert config.params_dtype == config.pipeline_dtype == dtype
    assert config.bf16 == (dtype == torch.bfloat16)


def test_recomputation() -> None:
    def granularity(recompute: Recompute) -> str | None:
        return backbone.transformer_config(tiny_model().backbone, fp32(recompute=recompute)).recompute_granularity

    assert [granularity(recompute) for recompute in Recompute] == [None, "selective", "full"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_layers_use_our_norm_and_attention(qk_norm: bool) -> None:
    layer = backbone._layer_spec(qk_norm).submodules
    attention = layer.self_attention.submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
    assert attention.core_attention is DocumentAttention
    assert attention.linear_qkv is layer.mlp.submodules.linear_fc1 is ColumnParallel
    assert attention.linear_proj is layer.mlp.submodules.linear_fc2 is RowParallel
    assert (attention.q_layernorm is RMSNorm) == (attention.k_layernorm is RMSNorm) == qk_norm


def test_rotary_angles_by_hand() -> None:
    angles = backbone.rotary_angles(torch.tensor([[0, 1], [3, 0]]), head_dim=4, theta=100.0)
    assert angles.shape == (2, 2, 1, 4)
    assert angles[1, 0, 0].tolist() == pytest.approx([3.0, 0.3, 3.0, 0.3])
    assert angles[0, 1, 0].tolist() == pytest.approx([1.0, 0.1, 1.0, 0.1])
    assert angles[0, 0].abs().sum() == angles[1, 1].abs().sum() == 0


def test_rms_norm_by_hand() -> None:
    config = backbone.transformer_config(tiny_model().backbone, fp32())
    norm = RMSNorm(config, 4, eps=0.5)
    torch.nn.init.constant_(norm.weight, 2.0)
    x = torch.tensor([[1.0, -1.0, 3.0, 0.0]])
    assert torch.allclose(norm(x), 2 * x / (11 / 4 + 0.5) ** 0.5)
