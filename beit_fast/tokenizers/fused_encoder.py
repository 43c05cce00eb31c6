"""DALL-E's encoder for inference on a GPU: channels last, its passes over activations fused, its products in place.

The bias of a block's last convolution is not added there: per channel it commutes with the pool and with the sum, so it
is moved, when the weights are prepared, into the next pass that reads its result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from beit_fast.kernels.conv import bias_relu, conv_relu, pixel_conv, pool_bias_relu
from beit_fast.tokenizers.dalle_networks import Block, Conv2d, DalleEncoder

__all__ = ["FusedEncoder"]


class _Block(NamedTuple):
    pending: Tensor | None
    """(C,) fp32: what is still to be added to the block's input; None where its rectified form is given."""
    convs: list[tuple[Tensor, Tensor]]
    """Weight and bias of the 3x3 convolutions."""
    last: Tensor
    """(hidden, n_out) of the 1x1 convolution, without its bias."""
    identity: Tensor | None
    """(n_in, n_out), without its bias."""
    gain: float


class FusedEncoder:
    """The features of an encoder, whose weights are copied: later changes of it are not seen."""

    def __init__(self, encoder: DalleEncoder, dtype: torch.dtype, scale: float, shift: float) -> None:
        """Prepare the weights.

        Args:
            encoder: in any precision.
            dtype: of weights and activations; biases that a fused pass adds stay fp32.
            scale, shift: applied to the pixels of an image in [0, 1].
        """
        first, *groups, _ = encoder.blocks
        assert isinstance(first, Conv2d)
        self.scale, self.shift = scale, shift
        self.first = first.w.to(dtype), first.b.float()
        self.groups: list[list[_Block]] = []
        self.pending: list[Tensor] = []
        """(C,) fp32: what is still to be added to the result of each group."""
        for group in groups:
            blocks, pending = [], None
            for module in group.children():
                if isinstance(module, Block):
                    blocks.append(_prepared(module, dtype, pending))
                    pending = _pending_after(module, pending)
            assert pending is not None
            self.groups.append(blocks)
            self.pending.append(pending.float())

    def __call__(self, images: Tensor) -> Tensor:
        """Give the features of images.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, C, h, w), channels last: the input of the output convolution.
        """
        x, rectified = pixel_conv(images.float(), *self.first, self.scale, self.shift)  # (B, H, W, C)
        for blocks, pending in zip(self.groups, self.pending, strict=True):
            for block in blocks:
                hidden = rectified if block.pending is None else bias_relu(x, block.pending)
                hidden = hidden.permute(0, 3, 1, 2)
                for weight, bias in block.convs:
                    hidden = conv_relu(hidden, weight, bias)
                x = _add_product(x, hidden.permute(0, 2, 3, 1), block)
            if blocks is not self.groups[-1]:
                x, rectified = pool_bias_relu(x, pending)
        return bias_relu(x, pending).permute(0, 3, 1, 2)


def _add_product(x: Tensor, hidden: Tensor, block: _Block) -> Tensor:
    """x (B, H, W, n_in) or its product with `identity`, plus gain * hidden @ last: (B, H, W, n_out), in place."""
    rows = x.flatten(0, 2)
    if block.identity is not None:
        rows = rows @ block.identity
    rows.addmm_(hidden.flatten(0, 2), block.last, alpha=block.gain)
    return rows.view(*x.shape[:3], -1)


def _matrix(conv: Conv2d, dtype: torch.dtype) -> Tensor:
    return conv.w[:, :, 0, 0].t().to(dtype).contiguous()


def _prepared(block: Block, dtype: torch.dtype, pending: Tensor | None) -> _Block:
    *convs, last = block.convs
    weights = [(conv.w.to(dtype, memory_format=torch.channels_last), conv.b.to(dtype)) for conv in convs]
    identity = _matrix(block.id_path, dtype) if isinstance(block.id_path, Conv2d) else None
    return _Block(None if pending is None else pending.float(), weights, _matrix(last, dtype), identity, block.gain)


def _pending_after(block: Block, pending: Tensor | None) -> Tensor:
    """Identity path of what was pending, plus the biases of the 1x1 convolutions: (n_out,) fp64."""
    total = block.gain * block.convs[-1].b.double()
    if not isinstance(block.id_path, Conv2d):
        return total if pending is None else total + pending
    total = total + block.id_path.b.double()
    return total if pending is None else total + block.id_path.w[:, :, 0, 0].double() @ pending
