"""The official initialisations, of pre-training and of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beit_fast.models.backbone import BeitBackbone
from beit_fast.nn import Block


def rescale_outputs(blocks: Sequence[Block], first: int = 1) -> None:
    """Divides the output matrices of block l by sqrt(2l), which keeps deep pre-training stable (paper section 2.5).

    Args:
        first: number l of the first of the blocks.
    """
    with torch.no_grad():
        for index, block in enumerate(blocks, start=first):
            block.attn.proj.weight.div_(math.sqrt(2.0 * index))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * index))


def _init_matrices(backbone: BeitBackbone, std: float, bound: float, patch_embed: bool) -> None:
    """Truncated normal weights and zero biases for every linear layer, and for the patch projection if told to."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear) or (patch_embed and isinstance(module, nn.Conv2d)):
            _truncated_normal(module.weight, std, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in (backbone.cls_token, backbone.pos_embed):
        if token is not None:
            _truncated_normal(token, std, bound)


def _truncated_normal(weight: Tensor, std: float, bound: float) -> None:
    nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-bound, b=bound)


def init_for_pretraining(backbone: BeitBackbone, mask_token: Tensor) -> None:
    """The official initialisation of pre-training: normal, truncated at one standard deviation."""
    std = backbone.config.init_std
    _init_matrices(backbone, std, bound=std, patch_embed=True)
    _truncated_normal(mask_token, std, std)
    rescale_outputs(backbone.layers())


def init_for_fine_tuning(backbone: BeitBackbone) -> None:
    """The official initialisation of fine-tuning: normal, truncated at +-2."""
    _init_matrices(backbone, backbone.config.init_std, bound=2.0, patch_embed=False)
    rescale_outputs(backbone.layers())


def init_head(head: nn.Linear, std: float, scale: float) -> None:
    """The official initialisation of a classifier: that of fine-tuning, scaled down."""
    _truncated_normal(head.weight, std, bound=2.0)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight.mul_(scale)
