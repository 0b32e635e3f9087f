"""The projections from either visual pathway into the backbone's width.

Janus uses the same shape twice: linear, exact (erf) GELU, linear, with biases. They are small, so every tensor-parallel
rank computes them in full.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Adaptor(nn.Module):
    """fc2(gelu(fc1(x))): [..., input_size] -> [..., hidden_size]."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_size] -> [..., hidden_size]."""
        return self.fc2(F.gelu(self.fc1(x)))
