"""`masked_cross_entropy`: schema, dispatch, CPU kernel, autograd."""

from typing import Any

import torch
from torch import Tensor

from ..backend import chosen_backend, triton_runs
from . import reference

IGNORED = -100  # the target of a row that only pads `rows` to a fixed length


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
    """The loss of BEiT pre-training (Bao et al. 2021, eq. 2) at the masked positions, and its accuracy.

    LayerNorm of hidden[rows], linear head, cross entropy. Under autocast the head runs in autocast's dtype.

    Args:
        hidden: (T, D), the output of the last block before the final LayerNorm.
        rows: int64 (M,), which rows of `hidden` to read. A row may occur twice only where its target is -100.
        targets: int64 (M,), the visual token to predict; -100 for rows that only pad to a fixed length.
        norm_weight, norm_bias: (D,) of the final LayerNorm.
        head_weight, head_bias: (V, D) and (V,) of the linear head.
        eps: of the LayerNorm.
        num_targets: 0-d tensor that divides the sum, such as the mean over ranks of the number of targets;
            None: the number of targets other than -100 here.

    Returns:
        loss, 0-d, at least fp32; and the number of rows predicted right, 0-d int64. No host synchronisation.
    """
    if hidden.dim() != 2 or rows.dim() != 1 or rows.shape != targets.shape:
        raise ValueError(
            "hidden must be (T, D), rows and targets (M,) each, "
            f"got {tuple(hidden.shape)}, {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head_weight must be (V, D = {hidden.shape[1]}), got {tuple(head_weight.shape)}")
    if chosen_backend() == "reference":
        return reference.masked_cross_entropy(
            hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, eps, num_targets
        )
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
        head_weight, head_bias = head_weight.to(compute), head_bias.to(compute)
    if num_targets is None:
        num_targets = (targets != IGNORED).sum()
    learned = (hidden, norm_weight, norm_bias, head_weight, head_bias)
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
    loss, num_correct, *_ = torch.ops.beit_fast.masked_cross_entropy(
        hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, eps, num_targets, with_gradient
    )
    return loss, num_correct


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("beit_fast::masked_cross_entropy", mutates_args=())
def _loss(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    eps: float,
    num_targets: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, num_correct; for backward d(sum)/d(logits) (M, V), the normed rows (M, D), their mean and 1/std (M,)."""
    if triton_runs(hidden):
        from . import kernel

        return kernel.masked_cross_entropy_forward(
            hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, eps, num_targets, with_gradient
        )
    wide, compute = _wide(hidden.dtype), head_weight.dtype
    normed, mean, rstd = torch.native_layer_norm(
        hidden.index_select(0, rows).to(wide), hidden.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps
    )
    normed = normed.to(compute)
    logits = torch.addmm(head_bias, normed, head_weight.t())
    valid = targets != IGNORED
    index = targets.where(valid, 0)[:, None]
    at_target = logits.gather(1, index).to(wide).squeeze(1)
    largest, best = logits.max(1)
    num_correct = ((best == targets) & valid).sum()
    if with_gradient:
        # in place: from here on `logits` holds the probabilities, then the gradient
        logits = torch.softmax(logits, 1, out=logits)
        # the largest probability is 1 / sum(exp(logit - largest)): the log-sum-exp without another pass
        log_sum = largest.to(wide) - logits.gather(1, best[:, None]).squeeze(1).to(wide).log()
        logits.scatter_add_(1, index, -torch.ones_like(index, dtype=compute))
        logits.masked_fill_(~valid[:, None], 0)
    else:
        log_sum = torch.logsumexp(logits.to(wide), 1)
    loss = (log_sum - at_target).masked_fill(~valid, 0).sum() / num_targets
    if not with_gradient:
        logits, normed, mean, rstd = (logits.new_empty(0) for _ in range(4))
        mean, rstd = mean.to(wide), rstd.to(wide)
    return loss, num_correct, logits, normed, mean.flatten(), rstd.flatten()


@_loss.register_fake
def _(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    eps: float,
    num_targets: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, M = _wide(hidden.dtype), rows.shape[0]
    loss, num_correct = hidden.new_empty((), dtype=wide), rows.new_empty(())
    if not with_gradient:
        logits, normed = (head_weight.new_empty(0) for _ in range(2))
        mean, rstd = (hidden.new_empty(0, dtype=wide) for _ in range(2))
        return loss, num_correct, logits, normed, mean, rstd
    logits = head_weight.new_empty(M, head_weight.shape[0])
    normed = head_weight.new_empty(M, hidden.shape[1])
    mean, rstd = (hidden.new_empty(M, dtype=wide) for _ in range(2))
    return loss, num_correct, logits, normed, mean, rstd


@torch.library.custom_op("beit_fast::masked_cross_entropy_backward", mutates_args=())
def _loss_backward(
    factor: Tensor,
    grad_logits: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, norm_weight, norm_bias, head_weight, head_bias); factor = d(loss) / num_targets."""
    if triton_runs(hidden):
        from . import kernel

        return kernel.masked_cross_entropy_backward(
            factor, grad_logits, normed, mean, rstd, hidden, rows, targets, norm_weight, head_weight
        )
    wide, compute = _wide(hidden.dtype), head_weight.dtype
    # the factor multiplies the two small matrices, never the (M, V) one
    grad_head_weight = grad_logits.t() @ (normed * factor.to(compute))
    grad_head_bias = grad_logits.sum(0, dtype=wide) * factor
    grad_normed = (grad_logits @ head_weight).to(wide) * factor
    grad_rows, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed, hidden.index_select(0, rows).to(wide), hidden.shape[-1:], mean[:, None], rstd[:, None],
        norm_weight.to(wide), norm_weight.to(wide), [True, True, True],
    )  # fmt: skip
    # padding rows may repeat a row that has a target: they go to a row of their own, which is then cut off
    T = hidden.shape[0]
    grad_hidden = hidden.new_zeros(T + 1, hidden.shape[1])
    grad_hidden.index_copy_(0, rows.where(targets != IGNORED, T), grad_rows.to(hidden.dtype))
    return grad_hidden[:T], grad_norm_weight, grad_norm_bias, grad_head_weight, grad_head_bias


@_loss_backward.register_fake
def _(
    factor: Tensor,
    grad_logits: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, (V, D) = _wide(hidden.dtype), head_weight.shape
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(D, dtype=wide),
        hidden.new_empty(D, dtype=wide),
        head_weight.new_empty(V, D),
        hidden.new_empty(V, dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, _, num_targets, _ = inputs
    _, num_correct, grad_logits, normed, mean, rstd = output
    ctx.mark_non_differentiable(num_correct, grad_logits, normed, mean, rstd)
    ctx.dtypes = norm_bias.dtype, head_bias.dtype
    ctx.save_for_backward(grad_logits, normed, mean, rstd, hidden, rows, targets, norm_weight, head_weight, num_targets)


def _autograd(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits, normed, mean, rstd, hidden, rows, targets, norm_weight, head_weight, num_targets = ctx.saved_tensors
    d_hidden, d_norm_weight, d_norm_bias, d_head_weight, d_head_bias = (
        torch.ops.beit_fast.masked_cross_entropy_backward(
            grad_loss / num_targets, grad_logits, normed, mean, rstd, hidden, rows, targets, norm_weight, head_weight
        )
    )
    norm_bias_dtype, head_bias_dtype = ctx.dtypes
    return (
        d_hidden,
        None,
        None,
        d_norm_weight.to(norm_weight.dtype),
        d_norm_bias.to(norm_bias_dtype),
        d_head_weight,
        d_head_bias.to(head_bias_dtype),
        None,
        None,
        None,
    )


_loss.register_autograd(_autograd, setup_context=_setup)
