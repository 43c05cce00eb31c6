"""The networks of DALL-E's discrete VAE (Ramesh et al., 2021, appendix A.2).

Parameter names are those of OpenAI's released files (`blocks.*.w`, `blocks.*.b`), so their tensors load unchanged.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EPS", "Block", "Conv2d", "DalleDecoder", "DalleEncoder", "map_pixels", "unmap_pixels"]

EPS = 0.1  # keeps pixels away from 0 and 1, where the logit-Laplace density has its poles
_GROUPS = 4


def map_pixels(images: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9]."""
    return (1 - 2 * EPS) * images + EPS


def unmap_pixels(images: Tensor) -> Tensor:
    """[0.1, 0.9] -> [0, 1], clamped."""
    return ((images - EPS) / (1 - 2 * EPS)).clamp(0, 1)


class Conv2d(nn.Module):
    """A stride-1 "same" convolution whose parameters are called w and b; they give the precision it runs in."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel).normal_(std=(n_in * kernel**2) ** -0.5))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """id(x) + gain * res(x): four convolutions, each after a ReLU; the identity path sees the raw input."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        hidden = n_out // 4
        self.gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        sizes = (n_in, hidden, hidden, hidden, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            layers[f"relu_{i}"] = nn.ReLU(inplace=i > 1)  # the first reads what the identity path reads too
            layers[f"conv_{i}"] = Conv2d(sizes[i - 1], sizes[i], kernel)
        self.res_path = nn.Sequential(layers)

    @property
    def convs(self) -> list[Conv2d]:
        """The four convolutions of the residual path."""
        return [layer for layer in self.res_path if isinstance(layer, Conv2d)]

    @torch.no_grad()
    def fold_gain(self) -> None:
        """Multiply the last convolution by the gain, which then is 1; a second call does nothing."""
        self.convs[-1].w.mul_(self.gain)
        self.convs[-1].b.mul_(self.gain)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.gain == 1.0:
            return self.res_path(x).add_(self.id_path(x))
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def _network(
    n_in: int, widths: list[int], n_out: int, blocks: int, kernels: tuple[int, int, int, int], between: nn.Module
) -> nn.Sequential:
    """A convolution to widths[0] channels, groups of residual blocks with `between` in between, a 1x1 convolution."""
    gain = 1 / (_GROUPS * blocks) ** 2
    encoder = isinstance(between, nn.MaxPool2d)
    layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(n_in, widths[0], 7 if encoder else 1))
    for g in range(1, _GROUPS + 1):
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, blocks + 1):
            group[f"block_{i}"] = Block(widths[g - 1] if i == 1 else widths[g], widths[g], kernels, gain)
        if g < _GROUPS:
            group["pool" if encoder else "upsample"] = between
        layers[f"group_{g}"] = nn.Sequential(group)
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], n_out, 1)))
    return nn.Sequential(layers)


class DalleEncoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits (B, V, H/8, W/8). 53,786,240 parameters at the released size."""

    def __init__(self, n_hid: int = 256, vocab_size: int = 8192, blocks: int = 2) -> None:
        super().__init__()
        self.width = n_hid
        widths = [n_hid, n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid]
        self.blocks = _network(3, widths, vocab_size, blocks, (3, 3, 3, 1), nn.MaxPool2d(2))

    def features(self, x: Tensor) -> Tensor:
        """(B, 8 n_hid, H/8, W/8): everything but the output convolution."""
        return F.relu(self.blocks[:-1](x), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DalleDecoder(nn.Module):
    """One-hot or soft tokens (B, V, h, w) -> (B, 6, 8h, 8w): mean and log-scale of a logit-Laplace density per channel.

    43,829,766 parameters at the released size.
    """

    def __init__(self, n_init: int = 128, n_hid: int = 256, vocab_size: int = 8192, blocks: int = 2) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        widths = [n_init, 8 * n_hid, 4 * n_hid, 2 * n_hid, n_hid]
        self.blocks = _network(vocab_size, widths, 6, blocks, (1, 3, 3, 3), nn.Upsample(scale_factor=2, mode="nearest"))

    def forward_ids(self, ids: Tensor) -> Tensor:
        """Decode hard tokens (B, h, w): the first convolution of a one-hot is a row look-up."""
        conv = self.blocks.get_submodule("input")
        assert isinstance(conv, Conv2d)
        x = F.embedding(ids, conv.w[:, :, 0, 0].t()) + conv.b
        return self.blocks[1:](x.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)
