"""Cross entropy, with z-loss if asked for, of logits whose vocabulary is cut over tp.

One autograd function does both: z-loss needs the logarithm of the softmax's denominator, which cross entropy has just
computed and megatron-core's version does not hand out (it also overwrites the logits, so a second pass over them would
read exponentials). It keeps what that one keeps for backward, the softmax in fp32, and two numbers per position.

Shapes: `n` labelled positions, `v` ids of the head.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLoss(torch.autograd.Function):
    """Loss per position, log(sum(exp(logits))) - logits[label] + z_loss * log(sum(exp(logits)))^2."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, z_loss: float, group: dist.ProcessGroup) -> Tensor:
        is_cut = group.size() > 1
        highest = logits.amax(dim=-1)
        if is_cut:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shares = (logits - highest.unsqueeze(-1)).exp_()
        own = labels - group.rank() * logits.shape[-1]
        is_own = (own >= 0) & (own < logits.shape[-1])
        own = torch.where(is_own, own, 0).unsqueeze(-1)
        scored = (logits.gather(-1, own).squeeze(-1) - highest) * is_own
        sums = torch.stack((shares.sum(dim=-1), scored))
        if is_cut:
            dist.all_reduce(sums, group=group)
        shares.div_(sums[0].unsqueeze(-1))
        log_of_sum = sums[0].log()
        log_partition = log_of_sum + highest
        ctx.save_for_backward(shares, own, is_own, log_partition)
        ctx.z_loss = z_loss
        return log_of_sum - sums[1] + z_loss * log_partition.square()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """softmax * (1 + 2 * z_loss * log_partition) - one_hot(label), times what comes from above."""
        shares, own, is_own, log_partition = ctx.saved_tensors
        gradient = shares * (1.0 + 2.0 * ctx.z_loss * log_partition).unsqueeze(-1)
        gradient.scatter_add_(-1, own, -is_own.to(gradient.dtype).unsqueeze(-1))
        return gradient.mul_(grad_output.unsqueeze(-1)), None, None, None


def vocab_parallel_loss(logits: Tensor, labels: Tensor, z_loss: float, group: dist.ProcessGroup) -> Tensor:
    """fp32 [n]: cross entropy plus z_loss times the square of the softmax's log-denominator, per position.

    Args:
        logits: fp32 [n, v/tp], this rank's part of the vocabulary.
        labels: int64 [n], ids of the whole vocabulary.
        z_loss: weight of the square (PaLM, arXiv 2204.02311, section 5, uses 1e-4); 0 leaves cross entropy.
        group: tensor-parallel ranks, in the order of their parts.
        Collective over: tp.
    """
    return _VocabParallelLoss.apply(logits, labels, z_loss, group)
