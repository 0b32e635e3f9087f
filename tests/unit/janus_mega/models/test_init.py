"""Fresh weights: a function of seed, name and global shape, with the distribution its table row says."""

import math
from dataclasses import replace

import pytest
import torch

from janus_mega.models.init import INIT_TABLE, initial_value
from tests.support.tiny import tiny_model

BACKBONE = tiny_model().backbone


def value(name: str, shape: tuple[int, ...] = (64, 64), seed: int = 0) -> torch.Tensor:
    return initial_value(name, shape, BACKBONE, seed)


def test_same_name_same_values_whatever_was_drawn_before() -> None:
    first = value("text_head.weight")
    torch.randn(1000)
    value("decoder.layers.0.mlp.linear_fc1.weight")
    assert torch.equal(value("text_head.weight"), first)


def test_names_and_seeds_give_different_values() -> None:
    first = value("decoder.layers.0.mlp.linear_fc1.weight")
    assert not torch.equal(value("decoder.layers.1.mlp.linear_fc1.weight"), first)
    assert not torch.equal(value("decoder.layers.0.mlp.linear_fc1.weight", seed=1), first)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    value("text_head.weight")
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("text_embedding.weight", 0.02),
        ("text_head.weight", 0.02),
        ("image_head.fc2.weight", 0.02),
        ("decoder.layers.3.self_attention.linear_qkv.weight", 0.02),
        ("decoder.layers.3.mlp.linear_fc1.weight", 0.02),
        ("decoder.layers.3.self_attention.linear_proj.weight", 0.02 / math.sqrt(8)),
        ("decoder.layers.3.mlp.linear_fc2.weight", 0.02 / math.sqrt(8)),
        ("generation_embedding.weight", 1.0),
        ("understanding_adaptor.fc1.weight", 1 / 8),
        ("image_head.fc1.weight", 1 / 8),
    ],
)
def test_matrices_are_normal_with_the_deviation_of_their_row(name: str, std: float) -> None:
    drawn = value(name)
    assert drawn.std().item() == pytest.approx(std, rel=0.05)
    assert abs(drawn.mean().item()) < 0.1 * std


def test_convolutions_count_their_whole_fan_in() -> None:
    drawn = value("understanding_encoder.embeddings.patch_embedding.weight", (64, 3, 4, 4))
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(48), rel=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.final_layernorm.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "understanding_encoder.encoder.layers.0.layer_norm1.weight",
        "understanding_encoder.post_layernorm.weight",
    ],
)
def test_norms_start_at_one(name: str) -> None:
    assert torch.equal(value(name, (64,)), torch.ones(64))


def test_biases_start_at_zero() -> None:
    for name in ("understanding_encoder.post_layernorm.bias", "image_head.fc2.bias", "generation_adaptor.fc1.bias"):
        assert torch.equal(value(name, (64,)), torch.zeros(64))


def test_the_configured_deviation_is_used() -> None:
    wide = initial_value("text_head.weight", (64, 64), replace(BACKBONE, init_std=0.2), 0)
    assert torch.allclose(wide, 10 * value("text_head.weight"))


def test_the_last_row_takes_every_name() -> None:
    assert INIT_TABLE[-1][0] == "*"
