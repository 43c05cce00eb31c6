"""`linear_argmax` in plain torch: the logits of some rows at a time."""

import torch
from torch import Tensor

LOGIT_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""Logits that exist at a time: on a CPU they stay in the cache, and are not handed back to the operating system."""


def linear_argmax(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows (P, C), weight (V, C), bias (V,), all of one dtype -> int64 (P,)."""
    count = max(1, LOGIT_BYTES.get(rows.device.type, 128 << 20) // (weight.shape[0] * weight.element_size()))
    parts = [torch.addmm(bias, part, weight.t()).argmax(1) for part in rows.split(count)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
