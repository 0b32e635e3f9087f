"""What an engine holds, as slices of global tensors, and back.

ZeRO keeps fp32 masters and moments as flat ranges of this rank's parameters; every range is told with its address, so
each rank writes the fragments it owns and nothing is gathered. Restoring runs over the same views the other way: a
slice's tensor is a view of the engine's memory, so reading a checkpoint is copying boxes into slices, whatever layout
wrote them. Parameters that all tp ranks hold whole are told by tp rank 0 and read by all.

Names: a weight's global name; moments are `optimizer.exp_avg/<name>` and `optimizer.exp_avg_sq/<name>`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from janus_mega.engine.deepspeed_backend import DeepSpeedEngine
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import Box, Slice, slices_of_local, slices_of_range

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per element."""

ReadBox = Callable[[str, Box], Tensor]
"""(tensor name, box) -> that box of the global tensor, fp32 on the CPU."""


def weight_slices(engine: DeepSpeedEngine, shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """The fp32 weights this rank is the one to write: over all ranks each element exactly once."""
    layout = engine.groups.layout
    for shard in shards:
        if not shard.is_cut and layout.tp_rank != 0:
            continue
        if shard.parameter.requires_grad:
            yield from _fragment_slices(shard, shard.name, _fragment(engine, shard.parameter, None))
        elif hasattr(shard.parameter, "ds_tensor"):
            part = _without_padding(shard.parameter, shard.parameter.ds_tensor.float())
            yield from _fragment_slices(shard, shard.name, part)
        elif layout.dp_rank == 0:
            local = shard.parameter.detach().float()
            yield from slices_of_local(shard.name, shard.global_shape, shard.regions, local)


def moment_slices(engine: DeepSpeedEngine, shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """AdamW's moments of the fragments this rank is the one to write; empty before the first update."""
    for shard in shards:
        if shard.parameter.requires_grad and (shard.is_cut or engine.groups.layout.tp_rank == 0):
            yield from _moments_of(engine, shard)


def restore_moments(engine: DeepSpeedEngine, shards: Iterable[ShardedParameter], step: int, read_box: ReadBox) -> None:
    """Fills the optimizer of a freshly built engine with saved moments, as after `step` updates."""
    for flat in _flat_partitions(engine):
        state = engine.optimizer.optimizer.state[flat]
        state["step"] = torch.tensor(float(step))
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat)
    for shard in shards:
        if shard.parameter.requires_grad:
            for piece in _moments_of(engine, shard):
                piece.tensor.copy_(read_box(piece.name, piece.box))


def load_weights(shards: Iterable[ShardedParameter], read_box: ReadBox) -> None:
    """Fills a materialised chunk with saved weights, before an engine wraps it."""
    with torch.no_grad():
        for shard in shards:
            shard.parameter.copy_(shard.cut(partial(read_box, shard.name)))


def _moments_of(engine: DeepSpeedEngine, shard: ShardedParameter) -> Iterator[Slice]:
    for moment in MOMENTS:
        part = _fragment(engine, shard.parameter, moment)
        yield from _fragment_slices(shard, f"optimizer.{moment}/{shard.name}", part)


def _fragment_slices(shard: ShardedParameter, name: str, fragment: tuple[Tensor, int] | None) -> Iterator[Slice]:
    if fragment is not None:
        flat, start = fragment
        yield from slices_of_range(Slice(name, shard.global_shape, (), flat), shard.regions, shard.local_shape, start)


def _fragment(engine: DeepSpeedEngine, parameter: nn.Parameter, moment: str | None) -> tuple[Tensor, int] | None:
    """(flat view of the fp32 master or a moment, its start in the flattened parameter) of what this rank optimizes."""
    if hasattr(parameter, "ds_id"):
        return _zero3_fragment(engine, parameter, moment)
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    address, start = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
    if moment is None:
        return mapping.get_hp_fragment(), start
    # Looked up in AdamW itself: DeepSpeed links moments to fragments after its first group stepped, so those of
    # later groups are missing from its own table.
    inner = engine.optimizer.optimizer
    state = inner.state[inner.param_groups[mapping.param_group_index]["params"][0]]
    return (state[moment].narrow(0, address.start, address.numel), start) if moment in state else None


def _zero3_fragment(engine: DeepSpeedEngine, parameter: Any, moment: str | None) -> tuple[Tensor, int] | None:
    zero = engine.optimizer
    flat = zero.get_local_fp32_param(parameter)
    if moment is not None:
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        state = zero.optimizer.state[zero.fp32_partitioned_groups_flat[group]]
        if moment not in state:
            return None
        flat = state[moment].narrow(0, offset, size)
    return _without_padding(parameter, flat)


def _without_padding(parameter: Any, flat: Tensor) -> tuple[Tensor, int] | None:
    """ZeRO-3 gives every dp rank an equal part; the last parts may be padding."""
    start = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
    size = min(flat.numel(), parameter.ds_numel - start)
    return (flat.flatten()[:size], start) if size > 0 else None


def _flat_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """The flat fp32 tensors that AdamW updates on this rank."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return [parameter for group in zero.optimizer.param_groups for parameter in group["params"]]
