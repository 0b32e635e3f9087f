"""The two heads: text ids and image ids, both vocabulary-parallel, both scored only at labelled positions.

A head returns the sum of cross entropies instead of logits: it is called with the labelled positions alone, works
through them in chunks, and so never holds logits of a whole batch. In fp32 at tp 1 torch's fused linear-cross-entropy
scores a chunk; above, each rank scores its part of the vocabulary and megatron-core's vocabulary-parallel cross entropy
joins them. Two cases go through `vocab_loss` at any tp: z-loss, which needs the softmax's denominator, and bf16 at
tp 1, where torch's would take the softmax, and round the sum over all positions, in bf16: good to two or three digits.

Shapes: `n` labelled positions, `h` hidden_size, `v` ids of the head.
"""

import copy

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from janus_mega.config.schema import LossConfig
from janus_mega.models.fp32_sums import ColumnParallel
from janus_mega.models.vocab_loss import vocab_parallel_loss


class VocabParallelHead(ColumnParallel):
    """Scores ids cut over tp: `weight` [v/tp, h], optional `bias` [v/tp]."""

    def __init__(self, config: TransformerConfig, vocab_size: int, loss: LossConfig, bias: bool = False) -> None:
        # Its input is a selection of positions, whole on every rank, never a slice of the sequence.
        unsliced = copy.copy(config)
        unsliced.sequence_parallel = False
        super().__init__(
            config.hidden_size, vocab_size, config=unsliced, init_method=nn.init.zeros_, bias=bias, gather_output=False
        )
        self.chunk_tokens = loss.chunk_tokens
        self.z_loss = loss.z_loss

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores hidden states [n, h].

        Returns:
            With labels [n]: fp32 [], the sum of their cross entropies, and of their z-losses where a gradient is
            wanted (so that validation compares runs of any weight). Without: logits [n, v], gathered.
            Collective over: tp.
        """
        if labels is None:
            logits, _ = super().forward(hidden.unsqueeze(1))
            return gather_from_tensor_model_parallel_region(logits, group=self.tp_group).squeeze(1)
        z_loss = self.z_loss if torch.is_grad_enabled() else 0.0
        if self.tp_group.size() == 1 and not z_loss and hidden.dtype == torch.float32:
            options = None
            if hidden.shape[0] > self.chunk_tokens:
                options = nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk_tokens)
            return F.linear_cross_entropy(
                hidden, self.weight, labels, linear_bias=self.bias, reduction="sum", options=options
            ).float()
        chunks = list(zip(hidden.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True))
        if len(chunks) == 1:
            return self._vocab_parallel_sum(*chunks[0], z_loss)
        sums = [checkpoint(self._vocab_parallel_sum, *chunk, z_loss, use_reentrant=False) for chunk in chunks]
        return torch.stack(sums).sum()

    def _vocab_parallel_sum(self, hidden: Tensor, labels: Tensor, z_loss: float) -> Tensor:
        logits, _ = super().forward(hidden.unsqueeze(1))  # [n, 1, v/tp]
        if z_loss or self.tp_group.size() == 1:
            return vocab_parallel_loss(logits.squeeze(1).float(), labels, z_loss, self.tp_group).sum()
        return vocab_parallel_cross_entropy(logits.float(), labels.unsqueeze(1)).sum()


class ImageHead(nn.Module):
    """Janus's image head: linear, exact GELU, linear over the codebook; only the last is cut over tp."""

    def __init__(self, config: TransformerConfig, inner_size: int, codebook_size: int, loss: LossConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, inner_size)
        inner = copy.copy(config)
        inner.hidden_size = inner_size
        self.fc2 = VocabParallelHead(inner, codebook_size, loss, bias=True)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """As VocabParallelHead.forward, for image ids."""
        return self.fc2(F.gelu(self.fc1(hidden)), labels)
