"""The two-layer perceptron of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast.kernels import bias_gelu

torch.fx.wrap("bias_gelu")


class Mlp(nn.Module):
    """fc1, exact (erf) GELU, fc2, each with dropout of rate `drop` after it (BEiT uses none)."""

    def __init__(self, width: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.drop2(self.fc2(self.drop1(bias_gelu(self.fc1(x), None))))
