"""What the faster blocks of timm and of transformers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast import kernels
from beit_fast.kernels import Bias
from beit_fast.nn.stock import is_stock


def inactive(dropout: nn.Module) -> bool:
    """Whether a dropout passes its input through, and nobody watches it do so."""
    if type(dropout) is nn.Dropout and dropout.p and dropout.training:
        return False
    return is_stock(dropout, nn.Dropout, nn.Identity)


def drop_factors(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """(B,) factors of the samples, drawn by the block's own drop path, whose random numbers thus stay the same."""
    if type(drop_path) is nn.Identity or not drop_path.training:
        return None
    return drop_path(x.new_ones(x.shape[0], *(1,) * (x.dim() - 1))).flatten()


def bias_for_all(bias: Tensor, view: Tensor) -> Tensor:
    """`view`, a view of the bias (H, N, N) that several blocks will be given, bringing with it the bias prepared."""
    if not torch.compiler.is_compiling():
        device = bias.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else bias.dtype
        # on a view, not on the bias itself: the prepared one refers to the bias, and such a circle would never be freed
        view._beit_fast_prepared = dtype, kernels.prepare_bias(bias, dtype)  # type: ignore[attr-defined]
    return view


def prepared(bias: Tensor, dtype: torch.dtype) -> Bias:
    """A bias (H, N, N) or (1, H, N, N) as the attention of that dtype takes it."""
    known_dtype, known = getattr(bias, "_beit_fast_prepared", (None, None))
    if known_dtype == dtype:
        return known
    return kernels.prepare_bias(bias[0] if bias.dim() == 4 else bias, dtype)
