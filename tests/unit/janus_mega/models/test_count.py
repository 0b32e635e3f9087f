"""Closed forms against modules that were really built (on the meta device)."""

import pytest
import torch
from torch import nn

from janus_mega.config.load import load_section
from janus_mega.config.schema import Module, RunConfig
from janus_mega.models.count import encoder_parameters, module_parameters, total_parameters, trainable_parameters


def model_of(name, *overrides):
    return load_section(RunConfig, "model", f"model/{name}.yaml", overrides)


@pytest.mark.parametrize("name", ["tiny", "janus_1b"])
def test_the_encoder_as_transformers_builds_it(name):
    from transformers.models.janus.configuration_janus import JanusVisionConfig
    from transformers.models.janus.modeling_janus import JanusVisionModel

    encoder = model_of(name).understanding
    config = JanusVisionConfig(
        hidden_size=encoder.hidden_size,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        mlp_ratio=encoder.mlp_ratio,
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
    )
    with torch.device("meta"):
        built = JanusVisionModel(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == encoder_parameters(encoder)


def test_the_backbone_as_transformers_llama():
    from transformers import LlamaConfig, LlamaModel

    backbone = model_of("tiny", "model.backbone.num_kv_heads=2").backbone
    config = LlamaConfig(
        hidden_size=backbone.hidden_size,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_heads,
        num_key_value_heads=backbone.num_kv_heads,
        intermediate_size=backbone.ffn_hidden_size,
        vocab_size=backbone.vocab_size,
    )
    with torch.device("meta"):
        built = LlamaModel(config)
    embedding = built.embed_tokens.weight.numel()
    counts = module_parameters(model_of("tiny", "model.backbone.num_kv_heads=2"))
    assert sum(parameter.numel() for parameter in built.parameters()) - embedding == counts[Module.backbone]
    assert embedding == counts[Module.text_embedding]


def test_qk_norm_adds_one_weight_per_head_dimension():
    plain, normed = (module_parameters(model_of("tiny", f"model.backbone.qk_norm={on}")) for on in ("false", "true"))
    assert normed[Module.backbone] - plain[Module.backbone] == 4 * 2 * 32


def test_the_image_head_has_an_own_inner_width():
    narrow = module_parameters(model_of("tiny", "model.image_head_hidden_size=64"))[Module.image_head]
    head = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 256))
    assert narrow == sum(parameter.numel() for parameter in head.parameters())


def test_sums():
    model = model_of("tiny")
    assert trainable_parameters(model, list(Module)) == total_parameters(model)
    assert trainable_parameters(model, [Module.text_head, Module.text_head]) == 2048 * 128
