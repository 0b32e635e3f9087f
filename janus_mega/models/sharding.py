"""How each parameter is cut over tp, and what it is called whatever the layout.

One table. A parameter's global name is its name in a chunk with the layer number counted over all pipeline ranks; its
global shape is what tp 1 holds. Initialisation, checkpoints and DeepSpeed's norm ("is this parameter cut?") read the
table; megatron-core's own attributes are set from it because layers are created uninitialised.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from janus_mega.parallel.layout import ChunkPlace, Layout
from janus_mega.parallel.slices import Box, Region, index_of


@dataclass(frozen=True, slots=True)
class ShardRule:
    """A parameter that is cut over tp along one dim."""

    pattern: str
    """fnmatch pattern over global names."""
    dim: int
    """The dim that is cut."""
    num_stacked: int = 1
    """Matrices stacked along `dim`, each cut by itself (gate and up rows of the gated MLP)."""


SHARD_RULES = (
    ShardRule("text_embedding.weight", 0),
    ShardRule("text_head.weight", 0),
    ShardRule("image_head.fc2.*", 0),
    ShardRule("decoder.layers.*.linear_qkv.weight", 0),
    ShardRule("decoder.layers.*.linear_proj.weight", 1),
    ShardRule("decoder.layers.*.linear_fc1.weight", 0, num_stacked=2),
    ShardRule("decoder.layers.*.linear_fc2.weight", 1),
)


@dataclass(frozen=True, slots=True)
class ShardedParameter:
    """One local parameter and its place in the global tensor."""

    name: str
    """Global name."""
    parameter: nn.Parameter
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    """Shape of the local parameter, also after ZeRO-3 has partitioned it away."""
    regions: tuple[Region, ...]
    """Which rectangles of the global tensor the local one holds."""
    is_cut: bool
    """Whether tp ranks hold different parts (else each holds all of it)."""

    def cut(self, read_box: Callable[[Box], Tensor]) -> Tensor:
        """The local value, read box by box of the global tensor."""
        parts = [(region, read_box(Box(region.global_offset, region.shape))) for region in self.regions]
        local = parts[0][1].new_empty(self.local_shape)
        for region, part in parts:
            local[index_of(Box(region.local_offset, region.shape))] = part
        return local


def sharded_parameters(chunks: Iterable[nn.Module], layout: Layout) -> Iterator[ShardedParameter]:
    """All parameters of this rank with their global names and regions; marks the cut ones for megatron.

    Args:
        chunks: JanusChunks (or modules without decoder layers).
        layout: this rank's place.
    """
    for chunk in chunks:
        first_layer = chunk.place.layers.start if isinstance(getattr(chunk, "place", None), ChunkPlace) else 0
        for local_name, parameter in chunk.named_parameters():
            yield _sharded(_global_name(local_name, first_layer), parameter, layout)


def _global_name(local_name: str, first_layer: int) -> str:
    """Counts the layer number over all pipeline ranks."""
    return re.sub(
        r"decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + first_layer}.", local_name, count=1
    )


def _sharded(name: str, parameter: nn.Parameter, layout: Layout) -> ShardedParameter:
    rule = _rule_of(name)
    # The attributes megatron-core and DeepSpeed look at to tell a cut parameter from a replicated one.
    parameter.tensor_model_parallel = rule is not None  # type: ignore[attr-defined]
    parameter.partition_dim = rule.dim if rule else -1  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    return _shard(name, parameter, rule, layout)


def _shard(name: str, parameter: nn.Parameter, rule: ShardRule | None, layout: Layout) -> ShardedParameter:
    shape = tuple(parameter.shape)
    regions = _regions(rule, shape, layout.tp_size, layout.tp_rank)
    if rule is None:
        return ShardedParameter(name, parameter, shape, shape, regions, is_cut=False)
    global_shape = tuple(size * layout.tp_size if dim == rule.dim else size for dim, size in enumerate(shape))
    return ShardedParameter(name, parameter, global_shape, shape, regions, is_cut=True)


def _regions(rule: ShardRule | None, shape: tuple[int, ...], tp_size: int, tp_rank: int) -> tuple[Region, ...]:
    """What a local parameter of some shape holds of the global one."""
    if rule is None:
        origin = (0,) * len(shape)
        return (Region(origin, origin, shape),)
    rows = shape[rule.dim] // rule.num_stacked
    return tuple(
        Region(
            local_offset=_along(rule.dim, len(shape), stacked * rows),
            global_offset=_along(rule.dim, len(shape), (stacked * tp_size + tp_rank) * rows),
            shape=tuple(rows if dim == rule.dim else size for dim, size in enumerate(shape)),
        )
        for stacked in range(rule.num_stacked)
    )


def tp_parts(
    name: str, global_shape: tuple[int, ...], tp_size: int
) -> list[tuple[tuple[int, ...], tuple[Region, ...]]]:
    """Local shape and regions of a parameter on each tp rank that is the one to write it; one where it is not cut.

    Raises:
        ValueError: its rows cannot be cut into so many parts.
    """
    rule = _rule_of(name)
    if rule is None:
        return [(global_shape, _regions(None, global_shape, 1, 0))]
    if global_shape[rule.dim] % (tp_size * rule.num_stacked):
        raise ValueError(f"{name}: {global_shape[rule.dim]} rows cannot be cut into {tp_size} tp parts")
    shape = tuple(size // tp_size if dim == rule.dim else size for dim, size in enumerate(global_shape))
    return [(shape, _regions(rule, shape, tp_size, tp_rank)) for tp_rank in range(tp_size)]


def _rule_of(name: str) -> ShardRule | None:
    return next((rule for rule in SHARD_RULES if fnmatchcase(name, rule.pattern)), None)


def _along(dim: int, ndim: int, offset: int) -> tuple[int, ...]:
    return tuple(offset if index == dim else 0 for index in range(ndim))
