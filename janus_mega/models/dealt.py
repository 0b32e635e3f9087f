"""A module's items dealt out to tensor-parallel ranks, and what it makes of them gathered again.

The understanding encoder is whole on every tp rank. Either every rank encodes every image, or each encodes its share
(`parallel.split_encoder`) and the features are gathered. What follows the gather is computed by all ranks alike, so
each has the whole gradient of the features and backward takes the rank's own share of it; the encoder's own gradients
are then partial, and `parallel.replicated` sums them.

Shapes: `m` items, the same on all tp ranks.
"""

from collections.abc import Callable

import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from janus_mega.parallel.layout import share_of


def dealt_over_tp(encode: Callable[[Tensor], Tensor], items: Tensor, tp_size: int, tp_rank: int) -> Tensor:
    """`encode(items)`, [m, ...] -> [m, ...], of which this rank encodes at most ceil(m / tp_size).

    A rank that has fewer encodes zeros beside them, so that all ranks call the module, gather equal sizes and have the
    same collectives in backward; what comes of the zeros is cut off.

    Collective over: tp.
    """
    mine, size = share_of(items.shape[0], tp_size, tp_rank)
    share = items[mine.start : mine.stop]
    missing = size - share.shape[0]
    if missing:
        share = F.pad(share, (*(0, 0) * (items.dim() - 1), 0, missing))
    features = gather_from_sequence_parallel_region(encode(share), tensor_parallel_output_grad=False)
    return features[: items.shape[0]]
