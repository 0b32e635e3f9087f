"""Where a rank stands: integers only, no torch.

Order of axes, fastest first: tp, dp, pp (megatron-core's default `tp-cp-ep-dp-pp`), so tensor-parallel ranks are
neighbours on a node and pipeline ranks are far apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import UserError


@dataclass(frozen=True, slots=True)
class Layout:
    """A job's degrees and one rank's coordinates in it."""

    world_size: int
    tp_size: int
    pp_size: int
    rank: int

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: world / (tp * pp)."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def tp_rank(self) -> int:
        """Place on the tensor-parallel axis."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """Place on the data-parallel axis."""
        return self.rank // self.tp_size % self.dp_size

    @property
    def pp_rank(self) -> int:
        """Place on the pipeline axis."""
        return self.rank // (self.tp_size * self.dp_size)


def make_layout(world_size: int, rank: int, tp_size: int, pp_size: int) -> Layout:
    """The layout of one rank.

    Raises:
        UserError: tp_size * pp_size does not divide world_size.
    """
    if world_size % (tp_size * pp_size):
        raise UserError(
            f"{world_size} ranks cannot be cut into tp_size {tp_size} x pp_size {pp_size}: "
            f"start a multiple of {tp_size * pp_size} ranks or change parallel.tp_size / parallel.pp_size"
        )
    return Layout(world_size, tp_size, pp_size, rank)


def share_of(num_items: int, num_ranks: int, rank: int) -> tuple[range, int]:
    """Which of some items are a rank's, in equal shares while they last, and the size of a full share."""
    size = -(-num_items // num_ranks)
    return range(min(rank * size, num_items), min((rank + 1) * size, num_items)), size


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where a chunk stands in the pipeline: which layers it holds, and whether it embeds or scores."""

    layers: range
    """Global numbers of its decoder layers."""
    is_first: bool
    """Whether it embeds."""
    is_last: bool
    """Whether it scores."""


def chunk_places(layer_counts: Sequence[int], pp_size: int, pp_rank: int) -> list[ChunkPlace]:
    """The chunks of a pipeline rank, in the order in which the stream passes them.

    Args:
        layer_counts: decoder layers of every chunk of the pipeline in the order of the stream; a multiple of pp_size.
            Chunk k lives on pipeline rank k % pp_size, so with more of them than ranks the stream comes by again
            (interleaving).
        pp_size: pipeline ranks.
        pp_rank: whose chunks.
    """
    places = []
    for number in range(pp_rank, len(layer_counts), pp_size):
        first = sum(layer_counts[:number])
        layers = range(first, first + layer_counts[number])
        places.append(ChunkPlace(layers, is_first=number == 0, is_last=number == len(layer_counts) - 1))
    return places
