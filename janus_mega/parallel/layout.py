"""Where a rank stands: integers only, no torch.

Order of axes, fastest first: tp, dp, pp (megatron-core's default `tp-cp-ep-dp-pp`), so tensor-parallel ranks are
neighbours on a node and pipeline ranks are far apart.
"""

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

    @property
    def is_first_pp_rank(self) -> bool:
        """Whether this rank embeds."""
        return self.pp_rank == 0

    @property
    def is_last_pp_rank(self) -> bool:
        """Whether this rank scores."""
        return self.pp_rank == self.pp_size - 1


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


def layer_range(num_layers: int, pp_size: int, pp_rank: int) -> range:
    """Global numbers of the decoder layers a pipeline rank holds: equal shares (num_layers % pp_size is 0)."""
    share = num_layers // pp_size
    return range(share * pp_rank, share * (pp_rank + 1))
