"""RMSNorm that knows about sequence parallelism.

megatron-core's torch norm refuses sequence parallelism, and its fused one needs TransformerEngine or apex. This one
computes with torch's kernel. Under sequence parallelism its weight sees a slice of the sequence; the sum of its
gradient over tp is declared in `parallel.replicated`.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim; the constructor is the one megatron's specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
