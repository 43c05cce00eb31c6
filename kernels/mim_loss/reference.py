"""The definition of `masked_cross_entropy`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    eps: float = 1e-6,
    num_targets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy over rows with a target, over `num_targets`; and how many were predicted right."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    normed = F.layer_norm(hidden[rows].to(wide), hidden.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps)
    logits = normed @ head_weight.to(wide).T + head_bias.to(wide)
    valid = targets != -100
    if num_targets is None:
        num_targets = valid.sum()
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_targets
    return loss, ((logits.argmax(-1) == targets) & valid).sum()
