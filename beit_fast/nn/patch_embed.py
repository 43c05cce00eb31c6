"""Patch embedding: a strided convolution in name and keys, one matrix product in fact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast.kernels import linear
from beit_fast.nn.stock import all_stock


def refuse_scripting() -> None:
    """What `torch.jit.script` calls first of every module that has it as `__prepare_scriptable__`."""
    raise TypeError("BEiT cannot be scripted (torch retires TorchScript): use torch.export or torch.jit.trace")


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each to the model width (paper section 2.1).

    The parameter is that of `Conv2d(in_chans, width, patch_size, stride=patch_size)`, so checkpoints of the official
    code, timm and transformers fit; the work is done as a reshape and a matrix product, which is faster and whose
    weight gradient is deterministic.
    """

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        # on the convolution, since a symbolic trace of the model keeps no other module of it
        vars(self.proj)["__prepare_scriptable__"] = refuse_scripting

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h*P, w*P) -> (B, h*w, D), patches in row-major order.

        Raises:
            ValueError: the images are not (B, C, height, width), or their sides not multiples of the patch size.
        """
        p, channels = self.patch_size, self.proj.in_channels
        if isinstance(images, torch.fx.Proxy):  # has no shape to check
            return self.proj(images).flatten(2).transpose(1, 2)
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be (B, {channels}, height, width), got {tuple(images.shape)}")
        batch, _, height, width = images.shape
        if height % p or width % p:
            raise ValueError(f"image sides must be multiples of the patch size {p}, got {height}x{width}")
        if not all_stock((self.proj, nn.Conv2d)):
            return self.proj(images).flatten(2).transpose(1, 2)
        patches = images.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, (height // p) * (width // p), channels * p * p)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)
