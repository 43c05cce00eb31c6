"""Heads that turn the feature maps of a BEiT into class logits: UPerNet with its auxiliary FCN head, and SETR-PUP.

Parameter names are those of mmsegmentation, in which the official weights were trained. All resizing is bilinear with
`align_corners=False`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    if features.shape[-2:] == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Head(nn.Module):
    """What all heads end with: dropout of whole channels, then one logit per class and position."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.conv_seg.bias))

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class UPerHead(_Head):
    """UPerNet (Xiao et al., "Unified perceptual parsing", ECCV 2018): pyramid pooling on top, a feature pyramid below.

    Args:
        in_channels: D, of each of the four maps.
        channels: of everything inside the head; D in the released models.
        pool_scales: sides of the grids that the coarsest map is averaged to.
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, dropout: float, pool_scales: Sequence[int]
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(in_channels, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(in_channels + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(in_channels, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, D, h_i, w_i), finest first -> (B, num_classes, h_0, w_0)."""
        top = maps[-1]
        pooled = [resize(module(top), top.shape[-2:]) for module in self.psp_modules]
        levels = [conv(features) for conv, features in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        for level in range(len(levels) - 1, 0, -1):
            below = levels[level - 1]
            levels[level - 1] = below + resize(levels[level], below.shape[-2:])
        outputs = [conv(features) for conv, features in zip(self.fpn_convs, levels[:-1], strict=True)]
        outputs.append(levels[-1])
        finest = outputs[0].shape[-2:]
        return self.classify(self.fpn_bottleneck(torch.cat([resize(output, finest) for output in outputs], dim=1)))


class FCNHead(_Head):
    """The auxiliary head of UPerNet: one convolution on one map."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.ModuleList([ConvModule(in_channels, channels, 3)])

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, num_classes, h, w)."""
        for conv in self.convs:
            features = conv(features)
        return self.classify(features)


class SetrUpHead(_Head):
    """SETR's progressive upsampling (Zheng et al., "Rethinking semantic segmentation", CVPR 2021).

    LayerNorm over the channels of each position, then `num_convs` times a convolution and an upsampling by `up_scale`.
    The head of PUP has four by 2, its auxiliary heads two by 4.
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, dropout: float, num_convs: int, up_scale: int
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.norm = nn.LayerNorm(in_channels, eps=1e-6)
        self.up_convs = nn.ModuleList(
            nn.Sequential(
                ConvModule(channels if number else in_channels, channels, 3),
                nn.Upsample(scale_factor=up_scale, mode="bilinear", align_corners=False),
            )
            for number in range(num_convs)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, num_classes, 16 h, 16 w)."""
        x = self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for up_conv in self.up_convs:
            x = up_conv(x)
        return self.classify(x)
