"""`bias_gelu` in plain torch, which differentiates it: for CPU, and for GPUs too old for our kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None, overwrite: bool) -> Tensor:
    """x (..., D), bias (D,) or None -> (..., D), in the memory of x where that may be overwritten and serves."""
    dtype, fresh = x.dtype, overwrite
    if bias is not None:
        if bias.dtype != dtype:
            x = x.to(torch.promote_types(dtype, torch.float32))
        x, fresh = x.add_(bias) if overwrite and x.dtype == dtype else x + bias, True
    if fresh and not (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.aten.gelu_(x).to(dtype)  # new memory costs more than the GELU itself
    return F.gelu(x).to(dtype)
