"""From sums of cross entropies per task to the one number that is differentiated.

With S_t the sum over all labels of task t in the global batch, N_t their number and w_t the task's weight:

    per_token:  loss = sum_t w_t S_t / sum_t N_t
    per_task:   loss = sum_t w_t S_t / N_t          (tasks with labels only)

The paper says neither which of the two it uses nor any weights; with hundreds of labels to an image, per_token gives
image generation most of the loss. A micro-batch contributes its own sums times `loss_scales`, which already hold what
the engine divides by afterwards, so nothing is rescaled after backward and any split of the batch gives the same value.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from janus_mega.config.schema import LossNormalization


def task_denominators(global_counts: Tensor, normalization: LossNormalization) -> Tensor:
    """fp64 [tasks]: what each task's sum is divided by, from the int64 [tasks] label counts of the global batch."""
    counts = global_counts.double()
    if normalization == LossNormalization.per_token:
        counts = counts.sum().expand_as(counts)
    return counts.clamp(min=1.0)


def loss_scales(
    denominators: Tensor,
    task_names: Sequence[str],
    task_weights: Mapping[str, float],
    dp_size: int,
    num_micro_batches: int,
) -> Tensor:
    """fp32 [tasks]: factors on a micro-batch's sums.

    scale_t = w_t * dp_size * num_micro_batches / denominator_t, since the engine averages gradients over dp and the
    schedule divides every micro-batch's loss by their number.
    """
    weights = torch.tensor([task_weights.get(name, 1.0) for name in task_names], dtype=torch.float64)
    weights = weights.to(denominators.device, non_blocking=True)
    return (weights * dp_size * num_micro_batches / denominators).float()
