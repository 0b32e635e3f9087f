"""What an engine holds, as slices of global tensors, and back.

Optimizers keep fp32 masters and moments as flat ranges of this rank's parameters; every range is told with its address,
so each rank writes the fragments it owns and nothing is gathered. A slice's tensor is a view of the engine's memory, so
restoring is filling the same slices with what a checkpoint holds there, whatever layout wrote it. Frozen weights that
are not fp32 are no such view: they are copied to the host to be written, never a second time on the device. Parameters
that all tp ranks hold whole are told for saving by tp rank 0 and for filling by all.

Names: a weight's global name; moments are `optimizer.exp_avg/<name>` and `optimizer.exp_avg_sq/<name>`.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from janus_mega.engine.interface import MOMENTS, StatefulEngine
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import ReadBox, Slice, slices_of_local, slices_of_range


def owned_shards(engine: StatefulEngine, shards: Iterable[ShardedParameter]) -> Iterator[ShardedParameter]:
    """Those parameters of which this rank's fragments are the ones to write."""
    for shard in shards:
        if shard.is_cut or engine.groups.layout.tp_rank == 0:
            yield shard


def weight_slices(
    engine: StatefulEngine, shards: Iterable[ShardedParameter], *, outlines: bool = False
) -> Iterator[Slice]:
    """The fp32 weights this rank is the one to write: over all ranks each element exactly once.

    With `outlines`, those that would have to be copied are told by tensors without content (on meta).
    """
    for shard in owned_shards(engine, shards):
        if shard.parameter.requires_grad or hasattr(shard.parameter, "ds_tensor"):
            yield from fragment_slices(shard, shard.name, engine.fragment(shard.parameter))
        elif engine.groups.layout.dp_rank == 0:
            local = _in_fp32(shard.parameter.detach(), outline=outlines)
            yield from slices_of_local(shard.name, shard.global_shape, shard.regions, local)


def _in_fp32(weight: Tensor, *, outline: bool) -> Tensor:
    """A weight as it is written: itself if it is fp32, else a copy in host memory."""
    if weight.dtype is torch.float32:
        return weight
    return torch.empty_like(weight, dtype=torch.float32, device="meta") if outline else weight.cpu().float()


def moment_slices(engine: StatefulEngine, shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """AdamW's moments of the fragments this rank is the one to write; empty before the first update."""
    yield from held_moments(engine, owned_shards(engine, shards))


def held_masters(engine: StatefulEngine, shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """The fp32 weights that this rank updates, to be filled; `publish_weights` then takes them to the parameters."""
    for shard in shards:
        if shard.parameter.requires_grad:
            yield from fragment_slices(shard, shard.name, engine.fragment(shard.parameter))


def held_moments(engine: StatefulEngine, shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """AdamW's moments of what this rank updates, to be filled; empty before the first update and `create_moments`."""
    for shard in shards:
        if shard.parameter.requires_grad:
            for moment in MOMENTS:
                part = engine.fragment(shard.parameter, moment)
                yield from fragment_slices(shard, f"optimizer.{moment}/{shard.name}", part)


def parameter_slices(shards: Iterable[ShardedParameter]) -> Iterator[Slice]:
    """The parameters themselves, to be filled before an engine wraps them."""
    for shard in shards:
        yield from slices_of_local(shard.name, shard.global_shape, shard.regions, shard.parameter.detach())


def fragment_slices(shard: ShardedParameter, name: str, fragment: tuple[Tensor, int] | None) -> Iterator[Slice]:
    """A flat fragment of a parameter (see `StatefulEngine.fragment`) as global pieces (views) under `name`."""
    if fragment is not None:
        flat, start = fragment
        yield from slices_of_range(
            Slice(name, shard.global_shape, (), flat.detach()), shard.regions, shard.local_shape, start
        )


def load_weights(shards: Iterable[ShardedParameter], read_box: ReadBox) -> None:
    """Fills a materialised chunk that no engine wraps with saved weights."""
    with torch.no_grad():
        for shard in shards:
            shard.parameter.copy_(shard.cut(partial(read_box, shard.name)))
