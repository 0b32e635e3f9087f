"""Parameter groups: the same list on every rank, matrices decay and vectors do not, rates by module."""

import torch
from torch import nn

from janus_mega.config.schema import OptimizerConfig
from janus_mega.optim.param_groups import build_param_groups

ATTRIBUTES = {"head": "head", "backbone": "decoder", "encoder": "encoder"}


class Chunk(nn.Module):
    """A decoder and a head with weights, biases and a norm; an encoder only on the first rank."""

    def __init__(self, has_encoder: bool = True) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3))
        self.head = nn.Linear(3, 2)
        if has_encoder:
            self.encoder = nn.Conv2d(3, 3, 2)


def config(**lr_scales: float) -> OptimizerConfig:
    return OptimizerConfig(lr=1e-3, weight_decay=0.1, lr_scales=lr_scales)


def names(chunk: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    return {name for name, parameter in chunk.named_parameters() if any(parameter is other for other in parameters)}


def test_matrices_decay_and_vectors_do_not() -> None:
    chunk = Chunk()
    decayed, plain = build_param_groups([chunk], ATTRIBUTES, ["head", "backbone", "encoder"], config())
    assert (decayed.weight_decay, plain.weight_decay) == (0.1, 0.0)
    assert names(chunk, decayed.parameters) == {"decoder.0.weight", "head.weight", "encoder.weight"}
    assert names(chunk, plain.parameters) == {"decoder.1.weight", "decoder.1.bias", "head.bias", "encoder.bias"}


def test_only_trainable_modules_are_grouped() -> None:
    chunk = Chunk()
    groups = build_param_groups([chunk], ATTRIBUTES, ["head"], config())
    assert names(chunk, [p for group in groups for p in group.parameters]) == {"head.weight", "head.bias"}


def test_frozen_parameters_are_left_out() -> None:
    chunk = Chunk()
    chunk.head.bias.requires_grad_(False)
    groups = build_param_groups([chunk], ATTRIBUTES, ["head"], config())
    assert names(chunk, [p for group in groups for p in group.parameters]) == {"head.weight"}


def test_rates_by_module() -> None:
    chunk = Chunk()
    groups = build_param_groups([chunk], ATTRIBUTES, ["head", "backbone"], config(head=0.1, encoder=7.0))
    scales = {name: group.lr_scale for group in groups for name in names(chunk, group.parameters)}
    assert scales == {"head.weight": 0.1, "head.bias": 0.1, "decoder.0.weight": 1.0} | dict.fromkeys(
        ("decoder.1.weight", "decoder.1.bias"), 1.0
    )
    assert {group.lr_scale for group in groups} == {0.1, 1.0}  # a frozen module's scale makes no group


def test_every_rank_builds_the_same_list() -> None:
    trainable = ["encoder", "head", "backbone"]
    first, other, empty = (
        build_param_groups([chunk], ATTRIBUTES, order, config(encoder=0.5))
        for chunk, order in (
            (Chunk(), trainable),
            (Chunk(has_encoder=False), trainable[::-1]),
            (nn.Module(), trainable),
        )
    )
    described = [
        [(group.name, group.lr_scale, group.weight_decay) for group in groups] for groups in (first, other, empty)
    ]
    assert described[0] == described[1] == described[2]
    assert len(described[0]) == 4
    assert all(not group.parameters for group in empty)


def test_each_parameter_stands_in_one_group() -> None:
    chunk = Chunk()
    groups = build_param_groups([chunk], ATTRIBUTES, ["encoder", "head", "backbone"], config(encoder=0.5))
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in chunk.parameters())


def test_decay_moves_matrices_alone() -> None:
    chunk = Chunk()
    groups = build_param_groups([chunk], ATTRIBUTES, ["head"], config())
    before = {name: value.detach().clone() for name, value in chunk.named_parameters()}
    adamw = torch.optim.AdamW([{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups], lr=0.5)
    for parameter in chunk.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    assert torch.allclose(chunk.head.weight, before["head.weight"] * (1 - 0.5 * 0.1))
    assert torch.equal(chunk.head.bias, before["head.bias"])
