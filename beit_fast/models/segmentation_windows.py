"""Segmentation of whole images by a window of the training size that slides over them (official evaluation)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last one ends with the side. One window, at 0, where it is no longer."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - window), 0) for index in range(count)]


@torch.no_grad()
def sliding_logits(
    predict: Callable[[Tensor], Tensor], image: Tensor, window: int, stride: int, batch_size: int = 8
) -> Tensor:
    """Logits of an image of any size, averaged where windows overlap.

    Args:
        predict: (b, C, window, window) -> logits (b, classes, window, window), e.g. a model's `predict`.
        image: (C, H, W), normalised. A side shorter than the window is filled up with zeros.
        window, stride: pixels; official 512 and 341, or 640 and 426.
        batch_size: windows per call.

    Returns:
        (classes, H, W) fp32.

    Raises:
        ValueError: the stride is not in [1, window], or the batch size is not positive.
    """
    if not 1 <= stride <= window or batch_size < 1:
        raise ValueError(f"needs 1 <= stride <= window and batch_size >= 1, got {stride}, {window}, {batch_size}")
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, max(window - width, 0), 0, max(window - height, 0)))
    high, wide = padded.shape[-2:]
    corners = [(y, x) for y in window_starts(high, window, stride) for x in window_starts(wide, window, stride)]
    total, seen = None, image.new_zeros((high, wide), dtype=torch.float32)
    for first in range(0, len(corners), batch_size):
        chosen = corners[first : first + batch_size]
        scores = predict(torch.stack([padded[:, y : y + window, x : x + window] for y, x in chosen])).float()
        if total is None:
            total = scores.new_zeros((scores.shape[1], high, wide))
        for (y, x), score in zip(chosen, scores, strict=True):
            total[:, y : y + window, x : x + window] += score
            seen[y : y + window, x : x + window] += 1
    assert total is not None
    return total.div_(seen)[:, :height, :width]
