"""The two-layer perceptron of a block."""

from __future__ import annotations

from torch import Tensor, nn

from beit_fast.kernels import bias_gelu


class Mlp(nn.Module):
    """fc1, exact (erf) GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(bias_gelu(self.fc1(x), None))
