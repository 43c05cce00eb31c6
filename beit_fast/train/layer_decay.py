"""Layer-wise learning-rate decay: the official parameter groups of fine-tuning."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from beit_fast.train.optim import is_decayed

_STEM = re.compile(r"(cls_token|mask_token|pos_embed|patch_embed\..*)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def layer_of(name: str, depth: int) -> int:
    """0 for the tokens, the position embedding and the patch embedding, i + 1 for block i, depth + 1 for the rest.

    The rest is the head, the last norm and, as in the official code, a relative position table shared by all blocks.
    """
    if _STEM.fullmatch(name):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else depth + 1


def layer_decay_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, depth: int, prefix: str = ""
) -> list[dict[str, Any]]:
    """Optimizer groups by layer and by weight decay: 28 for BEiT-B.

    The group of layer k has `lr_scale` = layer_decay ** (depth + 1 - k); BEiT-B at 0.65: stem 0.003697, first block
    0.005688, last block 0.65, head 1. Exempt from weight decay is what `optim.is_decayed` says.

    Args:
        depth: blocks of the backbone.
        prefix: of the backbone's names in `model`, e.g. `backbone.`; names without it belong to the last layer.

    Raises:
        ValueError: layer_decay outside (0, 1].
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"--layer-decay must be in (0, 1], got {layer_decay}")
    listed = getattr(model, "no_weight_decay", None)
    exempt = {prefix + name for name in (listed() if callable(listed) else ("pos_embed", "cls_token"))}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name.removeprefix(prefix), depth) if name.startswith(prefix) else depth + 1
        decayed = is_decayed(name, parameter, exempt)
        scale = layer_decay ** (depth + 1 - layer)
        new = {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        group = groups.setdefault((layer, decayed), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]
