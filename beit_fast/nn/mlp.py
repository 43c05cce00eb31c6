"""The two-layer perceptron of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast import kernels


class Mlp(nn.Module):
    """fc1, exact (erf) GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        branch = self.branch(x)
        return branch + self.fc2.bias.to(branch.dtype)

    def branch(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) without fc2's bias, which the residual op that follows adds."""
        hidden = F.linear(x, self.fc1.weight)
        return F.linear(kernels.bias_gelu(hidden, self.fc1.bias), self.fc2.weight)
