"""The definition of `residual_add` and `residual_layer_norm`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_add(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: Tensor | None, branch_bias: Tensor | None = None
) -> Tensor:
    """x + drop_path[b] * gamma * (branch + branch_bias), of the dtype of x; x and branch (B, N, D)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    update = branch.to(wide)
    if branch_bias is not None:
        update = update + branch_bias
    if gamma is not None:
        update = gamma * update
    if drop_path is not None:
        update = drop_path[:, None, None] * update
    return (x.to(wide) + update).to(x.dtype)


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of `residual_add` and its LayerNorm, the latter of the dtype of branch."""
    total = residual_add(x, branch, gamma, drop_path, branch_bias)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return total, normed.to(branch.dtype)
