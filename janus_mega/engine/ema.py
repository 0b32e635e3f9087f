"""A moving average of the weights, cut over ranks as the optimizer cuts its fp32 weights.

Each rank averages the fragments that it optimizes, so an average costs 4 bytes per trained parameter over dp and no
communication, whatever the layout, backend or ZeRO stage. Frozen parameters have none: their average is their value.

    average = decay * average + (1 - decay) * weight        after every update that was made
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from janus_mega.engine.interface import StatefulEngine
from janus_mega.engine.state import fragment_slices, owned_shards
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import Slice

EMA = "ema/"
"""Names of averages: `ema/<parameter name>`."""


class MovingAverage:
    """The average of one engine's weights; begins as the weights that the engine holds."""

    def __init__(self, engine: StatefulEngine, shards: Sequence[ShardedParameter], decay: float) -> None:
        """Copies the weights; `decay` is the share of the old value."""
        self._engine = engine
        self._shards = [shard for shard in shards if shard.parameter.requires_grad]
        self._decay = decay
        self._averages = [weight.clone() for weight in self._weights()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights in; to be called after every update that was made."""
        if self._averages:
            torch._foreach_lerp_(self._averages, list(self._weights()), 1.0 - self._decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins again with the present weights."""
        for average, weight in zip(self._averages, self._weights(), strict=True):
            average.copy_(weight)

    def held(self) -> list[Slice]:
        """All fragments of this rank as views."""
        return list(self._slices(self._shards))

    def owned(self) -> list[Slice]:
        """The fragments this rank is the one to write, as views; over all ranks each element exactly once."""
        return list(self._slices(list(owned_shards(self._engine, self._shards))))

    def _weights(self) -> Iterator[Tensor]:
        for shard in self._shards:
            fragment = self._engine.fragment(shard.parameter)
            if fragment is not None:
                yield fragment[0].detach()

    def _slices(self, shards: Sequence[ShardedParameter]) -> Iterator[Slice]:
        wanted = {shard.name for shard in shards}
        averages = iter(self._averages)
        for shard in self._shards:
            fragment = self._engine.fragment(shard.parameter)
            if fragment is not None:
                average = next(averages)
                if shard.name in wanted:
                    yield from fragment_slices(shard, EMA + shard.name, (average, fragment[1]))
