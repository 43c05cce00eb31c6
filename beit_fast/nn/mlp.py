"""The two-layer perceptron of a block."""

from __future__ import annotations

from torch import Tensor, nn

from beit_fast import kernels
from beit_fast.nn.stock import linear_without_bias


class Mlp(nn.Module):
    """fc1, exact (erf) GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        branch, bias = self.branch(x)
        return branch if bias is None else branch + bias.to(branch.dtype)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., D) -> (..., D), and the bias of fc2 that is still to be added: the residual op that follows does it."""
        hidden, bias = linear_without_bias(self.fc1, x)
        # a bias that is still to be added means that `hidden` was made here and is ours
        return linear_without_bias(self.fc2, kernels.bias_gelu(hidden, bias, may_overwrite=bias is not None))
