"""The definition of `bias_gelu`."""

import math

import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """t * Phi(t) of t = x + bias, Phi the normal distribution function: the exact GELU, not its tanh form."""
    t = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        t = t + bias
    return (0.5 * t * (1 + torch.erf(t / math.sqrt(2)))).to(x.dtype)
