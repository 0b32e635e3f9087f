"""Groups, layout and megatron agree; chunks of any layout hold one Janus; its fresh weights are the same in each."""

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from janus_mega.config.schema import LossConfig
from janus_mega.engine.mpu import Mpu
from janus_mega.models.init import initialize
from janus_mega.models.janus import build_chunks
from janus_mega.models.sharding import sharded_parameters
from janus_mega.parallel.groups import build_groups
from janus_mega.parallel.replicated import sum_replicated_gradients
from janus_mega.parallel.slices import Slice, assemble_all, slices_of_local
from tests.support.ranks import results_of_ranks
from tests.support.tiny import fp32, tiny_model

pytestmark = pytest.mark.dist

MODEL = tiny_model(qk_norm=True)


def tell_coordinates(tp_size: int, pp_size: int) -> dict[str, list[int]]:
    groups = build_groups(tp_size, pp_size)
    layout, mpu = groups.layout, Mpu(groups)
    return {
        "ours": [layout.tp_rank, layout.dp_rank, layout.pp_rank, layout.tp_size, layout.dp_size, layout.pp_size],
        "megatron": [
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        ],
        "groups": [
            groups.tp.rank(),
            groups.dp.rank(),
            groups.pp.rank(),
            groups.tp.size(),
            groups.dp.size(),
            groups.pp.size(),
        ],
        "mpu": [
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_data_parallel_rank(),
            groups.pp.rank(),
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_data_parallel_world_size(),
            mpu.get_pipeline_model_parallel_world_size(),
        ],
        "model": [mpu.get_model_parallel_world_size(), mpu.get_model_parallel_rank()],
        "ends": [parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()],
        "our_ends": [layout.pp_rank == 0, layout.pp_rank == pp_size - 1],
    }


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 2), (2, 1), (1, 2), (1, 4)])
def test_layout_is_megatrons(tp_size: int, pp_size: int) -> None:
    told = results_of_ranks(tell_coordinates, 4, tp_size, pp_size)
    for rank in told:
        assert rank["ours"] == rank["megatron"] == rank["groups"] == rank["mpu"]
        assert rank["ends"] == rank["our_ends"]
        assert rank["model"][0] == tp_size * pp_size
    assert sorted(rank["model"][1] for rank in told) == sorted([*range(tp_size * pp_size)] * (4 // (tp_size * pp_size)))


def build_and_fill(tp_size: int, pp_size: int) -> dict[str, list]:
    """This rank's parameters as pieces, and what the table says of each."""
    groups = build_groups(tp_size, pp_size)
    parallel = fp32(tp_size, pp_size, sequence_parallel=tp_size > 1)
    (chunk,) = build_chunks(MODEL, parallel, LossConfig(), groups.layout)
    assert {parameter.device.type for parameter in chunk.parameters()} == {"meta"}
    chunk.to_empty(device=groups.device)
    shards = list(sharded_parameters([chunk], groups.layout))
    initialize(shards, MODEL.backbone, seed=0)
    pieces = [
        (piece.name, piece.global_shape, piece.offset, piece.tensor.detach().clone())
        for shard in shards
        if shard.is_cut or groups.layout.tp_rank == 0
        for piece in slices_of_local(shard.name, shard.global_shape, shard.regions, shard.parameter)
    ]
    table = [(shard.name, list(shard.global_shape), list(shard.parameter.shape), shard.is_cut) for shard in shards]
    summed = sum_replicated_gradients(chunk, groups, fp32(2, sequence_parallel=True))
    return {
        "pieces": pieces,
        "table": table,
        "summed": summed,
        "buffers": [n for n, b in chunk.named_buffers() if b is not None],
    }


@pytest.fixture(scope="module")
def one() -> dict[str, list]:
    return results_of_ranks(build_and_fill, 1, 1, 1)[0]


@pytest.fixture(scope="module")
def four() -> list[dict[str, list]]:
    return results_of_ranks(build_and_fill, 4, 2, 2)


def joined(ranks: list[dict[str, list]]) -> dict[str, Tensor]:
    return assemble_all(Slice(*piece) for rank in ranks for piece in rank["pieces"])


def test_every_parameter_has_its_place_in_the_whole(one: dict[str, list], four: list[dict[str, list]]) -> None:
    whole = {name: shape for name, shape, _, _ in one["table"]}
    parts = {name: shape for rank in four for name, shape, _, _ in rank["table"]}
    assert parts == whole
    for rank in four:
        for name, global_shape, local_shape, is_cut in rank["table"]:
            # What megatron built smaller must be what the table calls cut, and nothing else.
            assert is_cut == (local_shape != global_shape), name


def test_fresh_weights_do_not_depend_on_the_layout(one: dict[str, list], four: list[dict[str, list]]) -> None:
    expected, found = joined([one]), joined(four)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_chunks_hold_no_buffers_that_meta_would_lose(one: dict[str, list]) -> None:
    assert one["buffers"] == []


def test_every_norm_of_the_decoder_is_summed_over_tp(four: list[dict[str, list]]) -> None:
    for rank in four:
        norms = {name for name, _, _, _ in rank["table"] if name.startswith("decoder.") and "norm" in name}
        assert len(rank["summed"]) == len(norms) > 0
