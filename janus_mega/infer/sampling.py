"""Choosing an id from logits.

Randomness comes as one uniform number per choice, drawn beforehand for the whole request: what an item becomes then
depends on the seed and its number alone, not on the batch it shares or on who finished earlier.
"""

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Ids int64 [b] from logits [b, v].

    Args:
        logits: any float format.
        temperature: 0 takes the largest logit (the first of equals).
        uniform: [b] in [0, 1), turned into ids through the inverse of the cumulative distribution.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    # fp64: the sums over a vocabulary would lose the tail in fp32.
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    targets = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
