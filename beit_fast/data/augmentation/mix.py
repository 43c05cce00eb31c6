"""Mixup and CutMix of whole batches, and the loss of their soft targets.

One lambda per *global* batch, as timm's batch mode has it (Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix",
ICCV 2019). Sample i of the batch is mixed with sample B - 1 - i. So that partners meet on one device whatever the split
into ranks and micro-batches, `paired_order` puts them side by side; every part of a batch must then be even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class Mix(NamedTuple):
    """How one global batch is mixed."""

    lam: float
    """Weight of a sample's own label (and, in mixup, of its own pixels)."""
    box: tuple[int, int, int, int] | None
    """CutMix: top, bottom, left, right of what comes from the partner. None: mixup, or (lam 1) nothing."""


@dataclass(frozen=True)
class Mixing:
    """Strength of mixup and CutMix; the defaults are those of BEiT's fine-tuning (paper, table 13).

    Raises:
        ValueError: a negative alpha, or a probability outside [0, 1].
    """

    mixup_alpha: float = 0.8
    """Beta distribution of mixup's lambda; 0 leaves mixup out."""
    cutmix_alpha: float = 1.0
    """Beta distribution of CutMix's lambda; 0 leaves CutMix out."""
    probability: float = 1.0
    """Share of the batches that are mixed at all."""
    switch_probability: float = 0.5
    """Share of CutMix where both are on."""

    def __post_init__(self) -> None:
        if self.mixup_alpha < 0 or self.cutmix_alpha < 0:
            raise ValueError(f"mixing: alphas must be at least 0, got {self.mixup_alpha}, {self.cutmix_alpha}")
        if not (0 <= self.probability <= 1 and 0 <= self.switch_probability <= 1):
            raise ValueError(
                f"mixing: probabilities must be in [0, 1], got {self.probability}, {self.switch_probability}"
            )

    @property
    def active(self) -> bool:
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def sample(self, seed: int, step: int, size: tuple[int, int]) -> Mix:
        """The mix of the global batch of optimizer step `step`; `size` (H, W) of the images. Pure in its arguments."""
        if not self.active:
            return Mix(1.0, None)
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
        mixed, cut = rng.random() < self.probability, rng.random() < self.switch_probability
        cut = self.cutmix_alpha > 0 and (cut or self.mixup_alpha == 0)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = float(rng.beta(alpha, alpha))
        if not mixed:
            return Mix(1.0, None)
        return cutmix(lam, size, float(rng.random()), float(rng.random())) if cut else Mix(lam, None)


def cutmix(lam: float, size: tuple[int, int], y: float, x: float) -> Mix:
    """The box around (y, x), in [0, 1), with sides sqrt(1 - lam) of the image's; lambda follows the clipped box."""
    height, width = size
    share = math.sqrt(1.0 - lam)
    cut_height, cut_width = int(height * share), int(width * share)
    centre_y, centre_x = int(y * height), int(x * width)
    top, bottom = max(centre_y - cut_height // 2, 0), min(centre_y + (cut_height + 1) // 2, height)
    left, right = max(centre_x - cut_width // 2, 0), min(centre_x + (cut_width + 1) // 2, width)
    return Mix(1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def paired_order(batch_size: int) -> NDArray[np.int64]:
    """Places 0, B-1, 1, B-2, ... of a batch: partners i and B - 1 - i side by side.

    Raises:
        ValueError: the batch size is odd.
    """
    if batch_size % 2:
        raise ValueError(f"mixup and CutMix pair the samples of a batch; its size must be even, not {batch_size}")
    half = np.arange(batch_size // 2, dtype=np.int64)
    return np.stack([half, batch_size - 1 - half], axis=1).reshape(-1)


def swap_partners(values: Tensor) -> Tensor:
    """(B, ...) with rows 2k and 2k + 1 exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Images (B, C, H, W), partners side by side, mixed; the input stays as it is."""
    if mix.lam == 1.0:
        return images
    if mix.box is None:
        return torch.lerp(swap_partners(images), images, mix.lam)
    top, bottom, left, right = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = swap_partners(images[:, :, top:bottom, left:right])
    return mixed


def mixed_cross_entropy(logits: Tensor, labels: Tensor, lam: Tensor | float, smoothing: float) -> Tensor:
    """Cross-entropy (B,) in fp32 of logits (B, C) for targets lam * smoothed(own) + (1 - lam) * smoothed(partner).

    `labels` int64 (B,), partners side by side; smoothed(y) is 1 - smoothing + smoothing / C at y, smoothing / C
    elsewhere. The dense targets are never built.
    """
    log_shares = F.log_softmax(logits.float(), dim=-1)
    own = log_shares.gather(1, labels[:, None]).squeeze(1)
    if not isinstance(lam, float) or lam != 1.0:
        partner = log_shares.gather(1, swap_partners(labels)[:, None]).squeeze(1)
        own = lam * own + (1.0 - lam) * partner
    if smoothing:
        own = (1.0 - smoothing) * own + smoothing * log_shares.mean(dim=1)
    return -own
