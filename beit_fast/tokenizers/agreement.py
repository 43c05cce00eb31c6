"""Agreement of the visual tokens of a lower precision with those of float32."""

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
    """Measure the share of tokens that a tokenizer gives in `dtype` as in float32.

    Args:
        name_or_path: as of `load_tokenizer`.
        batches: images (B, 3, H, W) in [0, 1].

    Returns:
        that share, and the number of tokens compared.
    """
    exact, rounded = (load_tokenizer(name_or_path, device=device, dtype=each) for each in (torch.float32, dtype))
    same = total = 0
    for images in batches:
        expected = exact.encode(images.to(device))
        same += int((rounded.encode(images.to(device)) == expected).sum())
        total += expected.numel()
    return same / max(total, 1), total
