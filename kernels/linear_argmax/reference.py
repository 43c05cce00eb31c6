"""The definition of `linear_argmax`."""

import torch
from torch import Tensor


def linear_argmax(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The column of the largest logit; of equal ones the first."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (rows.to(wide) @ weight.to(wide).t() + bias.to(wide)).argmax(1)
