"""The three steps around the head's matrix products in plain torch: for CPU, and for GPUs too old for our kernels.

Here, unlike in the kernels, the host looks at values: on a CPU that costs nothing.
"""

import torch
from torch import Tensor

IGNORED = -100  # the target of a row that only pads `rows` to a fixed length
_FAINT = -60.0  # a logit this far below the largest: its probability may be 0 in fp32


def gather_norm(
    hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of hidden[rows]: (M, D) as `dtype`; mean and 1/std (M,)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    normed, mean, rstd = torch.native_layer_norm(
        hidden.index_select(0, rows).to(wide), hidden.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    return normed.to(dtype), mean.flatten(), rstd.flatten()


def cross_entropy_(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Per row the cross entropy (0 without a target) and whether the largest logit is the target's.

    Args:
        logits: (M, V); replaced by the gradient of the summed cross entropy if `with_gradient`, else by anything.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    valid = targets != IGNORED
    index = targets.where(valid, 0)[:, None]
    at_target = logits.gather(1, index)
    largest = logits.amax(1, keepdim=True)
    hits = valid & (at_target == largest).squeeze(1)
    candidates = hits.nonzero().squeeze(1)  # a tie goes to the lowest index; argmax of every row costs four times amax
    hits[candidates] = logits.index_select(0, candidates).argmax(1) == targets[candidates]
    if logits.dtype == wide:
        faint = ((at_target - largest).squeeze(1) < _FAINT).nonzero().squeeze(1)
        rows = logits.index_select(0, faint)
        torch.softmax(logits, 1, out=logits)
        chance = logits.gather(1, index)
        losses = -chance.squeeze(1).log()
        losses[faint] = torch.logsumexp(rows, 1) - at_target[faint, 0]
    else:
        losses = torch.logsumexp(logits.to(wide), 1) - at_target.squeeze(1).to(wide)
        torch.softmax(logits, 1, out=logits)
        chance = torch.exp(-losses)[:, None]
    if with_gradient:
        logits.scatter_(1, index, (chance - 1).to(logits.dtype))
        if not bool(valid.all()):
            logits.masked_fill_(~valid[:, None], 0)
    return losses.masked_fill_(~valid, 0), hits


def gather_norm_backward(
    grad_normed: Tensor,
    factor: Tensor,
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias) of `gather_norm`, from factor (0-d) times grad_normed (M, D)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(wide)
    grad_rows, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(wide) * factor, hidden.index_select(0, rows).to(wide), hidden.shape[-1:],
        mean[:, None], rstd[:, None], weight, weight, [True, True, True],
    )  # fmt: skip
    # padding rows may repeat a row that has a target: they go to a row of their own, which is then cut off
    T = hidden.shape[0]
    destination = rows.where(targets != IGNORED, T)
    if hidden.device.type == "cpu" and bool((destination.bincount(minlength=T + 1)[:T] > 1).any()):
        raise ValueError("rows: a row with a target occurs twice; only rows whose target is -100 may repeat")
    grad_hidden = hidden.new_zeros(T + 1, hidden.shape[1])
    grad_hidden.index_copy_(0, destination, grad_rows.to(hidden.dtype))
    return grad_hidden[:T], grad_weight, grad_bias
