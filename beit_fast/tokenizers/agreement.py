"""How many visual tokens stay the same in a lower precision."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from beit_fast.tokenizers.load import load_tokenizer

__all__ = ["precision_agreement"]


def precision_agreement(
    name_or_path: str | Path, dtype: torch.dtype, batches: Iterable[Tensor], device: str | torch.device = "cpu"
) -> tuple[float, int]:
    """Share of tokens that a tokenizer gives in `dtype` as in float32, and their number.

    batches: images (B, 3, H, W) in [0, 1].
    """
    exact = load_tokenizer(name_or_path, device=device, dtype=torch.float32)
    rounded = load_tokenizer(name_or_path, device=device, dtype=dtype)
    same = total = 0
    for images in batches:
        wanted = exact.encode(images.to(device))
        same += int((rounded.encode(images.to(device)) == wanted).sum())
        total += wanted.numel()
    return same / max(total, 1), total
