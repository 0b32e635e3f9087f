"""What an engine holds, as slices of global tensors, and back.

Optimizers keep fp32 masters and moments as flat ranges of this rank's parameters; every range is told with its address,
so each rank writes the fragments it owns and nothing is gathered. Restoring runs over the same views the other way: a
slice's tensor is a view of the engine's memory, so reading a checkpoint is copying boxes into slices, whatever layout
wrote them. Parameters that all tp ranks hold whole are told by tp rank 0 and read by all.

Names: a weight's global name; moments are `optimizer.exp_avg/<name>` and `optimizer.exp_avg_sq/<name>`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from janus_mega.engine.interface import MOMENTS, StatefulEngine
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import Box, Slice, slices_of_local, slices_of_range

ReadBox = Callable[[str, Box], Tensor]
"""(tensor name, box) -> that box of the global tensor, fp32 on the CPU."""


def weight_slices(engine: StatefulEngine, shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """The fp32 weights this rank is the one to write: over all ranks each element exactly once."""
    layout = engine.groups.layout
    for shard in shards:
        if not shard.is_cut and layout.tp_rank != 0:
            continue
        if shard.parameter.requires_grad or hasattr(shard.parameter, "ds_tensor"):
            yield from _fragment_slices(shard, shard.name, engine.fragment(shard.parameter))
        elif layout.dp_rank == 0:
            local = shard.parameter.detach().float()
            yield from slices_of_local(shard.name, shard.global_shape, shard.regions, local)


def moment_slices(engine: StatefulEngine, shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """AdamW's moments of the fragments this rank is the one to write; empty before the first update."""
    for shard in shards:
        if shard.parameter.requires_grad and (shard.is_cut or engine.groups.layout.tp_rank == 0):
            yield from _moments_of(engine, shard)


def restore_moments(engine: StatefulEngine, shards: Iterable[ShardedParameter], step: int, read_box: ReadBox) -> None:
    """Fills the optimizer of a freshly built engine with saved moments, as after `step` updates."""
    engine.create_moments(step)
    for shard in shards:
        if shard.parameter.requires_grad:
            for piece in _moments_of(engine, shard):
                piece.tensor.copy_(read_box(piece.name, piece.box))


@torch.no_grad()
def restore_masters(engine: StatefulEngine, shards: Iterable[ShardedParameter], read_box: ReadBox) -> None:
    """Fills the fp32 weights that a freshly built engine updates: under bf16 it has made them from rounded ones."""
    for shard in shards:
        if shard.parameter.requires_grad:
            for piece in _fragment_slices(shard, shard.name, engine.fragment(shard.parameter)):
                piece.tensor.copy_(read_box(piece.name, piece.box))


def load_weights(shards: Iterable[ShardedParameter], read_box: ReadBox) -> None:
    """Fills a materialised chunk with saved weights, before an engine wraps it; see also `restore_masters`."""
    with torch.no_grad():
        for shard in shards:
            shard.parameter.copy_(shard.cut(partial(read_box, shard.name)))


def _moments_of(engine: StatefulEngine, shard: ShardedParameter) -> Iterator[Slice]:
    for moment in MOMENTS:
        part = engine.fragment(shard.parameter, moment)
        yield from _fragment_slices(shard, f"optimizer.{moment}/{shard.name}", part)


def _fragment_slices(shard: ShardedParameter, name: str, fragment: tuple[Tensor, int] | None) -> Iterator[Slice]:
    if fragment is not None:
        flat, start = fragment
        yield from slices_of_range(Slice(name, shard.global_shape, (), flat), shard.regions, shard.local_shape, start)
