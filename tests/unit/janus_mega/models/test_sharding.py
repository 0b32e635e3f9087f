"""The cutting table: every rule cuts and joins without loss, at the borders that megatron's layers expect."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

from janus_mega.models.sharding import SHARD_RULES, ShardedParameter, ShardRule, sharded_parameters
from janus_mega.parallel.layout import ChunkPlace, Layout
from janus_mega.parallel.slices import Box, assemble, index_of, slices_of_local

SHAPES = {
    "text_embedding.weight": (16, 3),
    "text_head.weight": (16, 3),
    "image_head.fc2.weight": (8, 3),
    "image_head.fc2.bias": (8,),
    "decoder.layers.1.self_attention.linear_qkv.weight": (24, 3),
    "decoder.layers.1.self_attention.linear_proj.weight": (3, 8),
    "decoder.layers.1.mlp.linear_fc1.weight": (16, 3),
    "decoder.layers.1.mlp.linear_fc2.weight": (3, 8),
    "decoder.layers.1.input_layernorm.weight": (3,),
    "image_head.fc1.weight": (5, 3),
    "understanding_encoder.encoder.layers.1.mlp.fc1.weight": (12, 3),
}
"""Global shapes; the last three are held whole by every rank."""


class Holder(nn.Module):
    """Parameters by dotted names, as a chunk would show them."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._held = parameters

    def named_parameters(self, *args: object, **options: object) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._held.items())


def rule_of(name: str) -> ShardRule | None:
    return next((rule for rule in SHARD_RULES if fnmatchcase(name, rule.pattern)), None)


def sharded(name: str, tp_size: int, tp_rank: int) -> ShardedParameter:
    shape = list(SHAPES[name])
    rule = rule_of(name)
    if rule:
        shape[rule.dim] //= tp_size
    holder = Holder({name: nn.Parameter(torch.empty(shape))})
    (parameter,) = sharded_parameters([holder], Layout(tp_size, tp_size, 1, tp_rank))
    return parameter


def full_value(name: str) -> Tensor:
    return torch.arange(float(torch.Size(SHAPES[name]).numel())).view(SHAPES[name])


def cut(name: str, tp_size: int, tp_rank: int) -> Tensor:
    return sharded(name, tp_size, tp_rank).cut(lambda box: full_value(name)[index_of(box)])


def test_every_rule_is_exercised() -> None:
    assert {rule_of(name) for name in SHAPES} == {*SHARD_RULES, None}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_cut_and_join_is_the_identity(name: str, tp_size: int) -> None:
    parameters = [sharded(name, tp_size, rank) for rank in range(tp_size)]
    locals_ = [cut(name, tp_size, rank) for rank in range(tp_size)]
    assert {parameter.global_shape for parameter in parameters} == {SHAPES[name]}
    assert all(local.shape == parameter.local_shape for local, parameter in zip(locals_, parameters, strict=True))
    if not parameters[0].is_cut:
        assert all(torch.equal(local, full_value(name)) for local in locals_)
        return
    pieces = [
        piece
        for parameter, local in zip(parameters, locals_, strict=True)
        for piece in slices_of_local(name, parameter.global_shape, parameter.regions, local)
    ]
    assert torch.equal(assemble(pieces), full_value(name))


def test_gate_and_up_rows_are_cut_by_themselves() -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    full = full_value(name)  # rows 0-7 gate, 8-15 up
    assert torch.equal(cut(name, 2, 0), full[[0, 1, 2, 3, 8, 9, 10, 11]])
    assert torch.equal(cut(name, 4, 3), full[[6, 7, 14, 15]])


def test_attention_heads_stay_whole() -> None:
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(cut(name, 2, 1), full_value(name)[12:])
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    assert torch.equal(cut(name, 2, 1), full_value(name)[:, 4:])


def test_layers_are_counted_over_pipeline_ranks() -> None:
    names = {f"decoder.layers.{layer}.input_layernorm.weight": nn.Parameter(torch.ones(3)) for layer in range(2)}
    holder = Holder(names)
    holder.place = ChunkPlace(range(2, 4), is_first=False, is_last=True)
    found = [p.name for p in sharded_parameters([holder], Layout(2, 1, 2, 1))]
    assert found == ["decoder.layers.2.input_layernorm.weight", "decoder.layers.3.input_layernorm.weight"]
    encoder = {"understanding_encoder.encoder.layers.0.mlp.fc1.weight": nn.Parameter(torch.ones(3, 3))}
    holder = Holder(encoder)
    holder.place = ChunkPlace(range(2, 4), is_first=False, is_last=True)
    (parameter,) = sharded_parameters([holder], Layout(2, 1, 2, 1))
    assert parameter.name == "understanding_encoder.encoder.layers.0.mlp.fc1.weight"


def test_parameters_are_marked_for_megatron_and_deepspeed() -> None:
    marked = sharded("text_head.weight", 2, 0).parameter
    assert (marked.tensor_model_parallel, marked.partition_dim, marked.partition_stride) == (True, 0, 1)
    whole = sharded("image_head.fc1.weight", 2, 0).parameter
    assert (whole.tensor_model_parallel, whole.partition_dim) == (False, -1)


def test_cut_reads_only_its_boxes() -> None:
    asked: list[Box] = []

    def read(box: Box) -> Tensor:
        asked.append(box)
        return full_value("text_head.weight")[index_of(box)]

    sharded("text_head.weight", 4, 2).cut(read)
    assert asked == [Box((8, 0), (4, 3))]
