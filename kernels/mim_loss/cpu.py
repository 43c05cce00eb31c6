"""The three steps around the head's matrix products in plain torch: for CPU, and for GPUs too old for our kernels."""

import torch
from torch import Tensor

IGNORED = -100  # the target of a row that only pads `rows` to a fixed length


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
        logits: (M, V); replaced by the gradient of the summed cross entropy if `with_gradient`.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    valid = targets != IGNORED
    index = targets.where(valid, 0)[:, None]
    at_target = logits.gather(1, index).squeeze(1).to(wide)
    largest, best = logits.max(1)
    if with_gradient and logits.dtype == wide:
        torch.softmax(logits, 1, out=logits)
        # the largest probability is 1 / sum(exp(logit - largest)): the log-sum-exp without another pass
        log_sum = largest - logits.gather(1, best[:, None]).squeeze(1).log()
    else:
        log_sum = torch.logsumexp(logits.to(wide), 1)
        if with_gradient:
            torch.softmax(logits, 1, out=logits)
    if with_gradient:
        logits.scatter_(1, index, torch.expm1(at_target - log_sum)[:, None].to(logits.dtype))  # p - 1 of the target
        logits.masked_fill_(~valid[:, None], 0)
    return (log_sum - at_target).masked_fill_(~valid, 0), (best == targets) & valid


def scatter_norm_backward(
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
