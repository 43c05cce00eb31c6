"""The operation `masked_cross_entropy`: LayerNorm of the masked rows, head, cross entropy and accuracy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.matmul import column_sums, matmul, wide_product
from beit_fast.kernels.mim_loss import cpu, reference
from beit_fast.kernels.mim_loss.cpu import IGNORED
from beit_fast.kernels.registration import fused_op


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
        norm_weight: (D,) of the final LayerNorm.
        norm_bias: (D,) of the final LayerNorm.
        head_weight: (V, D) of the linear head.
        head_bias: (V,) of the linear head.
        eps: of the LayerNorm.
        num_targets: 0-d tensor that divides the sum, such as the mean over ranks of the number of targets;
            None: the number of targets other than -100 here.

    Returns:
        loss, 0-d, at least fp32; and the number of rows predicted right, 0-d int64. No host synchronisation.

    Raises:
        ValueError: a shape does not fit; on a CPU, in the backward pass, also that a row with a target occurs twice.

    Examples:
        >>> import torch
        >>> from beit_fast.kernels import masked_cross_entropy
        >>> hidden, rows, targets = torch.randn(10, 8), torch.tensor([1, 4]), torch.tensor([0, 2])
        >>> norm, head = (torch.ones(8), torch.zeros(8)), (torch.zeros(16, 8), torch.zeros(16))
        >>> loss, num_correct = masked_cross_entropy(hidden, rows, targets, *norm, *head)
        >>> round(float(loss), 3)  # ln 16: all 16 tokens are equally probable
        2.773
    """
    if hidden.dim() != 2 or rows.dim() != 1 or rows.shape != targets.shape:
        raise ValueError(
            "hidden must be (T, D), rows and targets (M,) each, "
            f"got {tuple(hidden.shape)}, {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head_weight must be (V, D = {hidden.shape[1]}), got {tuple(head_weight.shape)}")
    backend = select("masked_cross_entropy", hidden)
    if backend == "reference":
        return reference.masked_cross_entropy(
            hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, eps, num_targets
        )
    compute = head_weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
    if num_targets is None:
        num_targets = (targets != IGNORED).sum()
    learned = (hidden, norm_weight, norm_bias, head_weight, head_bias)
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
    loss, num_correct, *_ = _masked_cross_entropy(
        hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, eps, num_targets, compute,
        with_gradient, backend,
    )  # fmt: skip
    return loss, num_correct


def _steps(backend: str) -> ModuleType:
    """The module whose functions go before, between and behind the head's matrix products."""
    if backend != "triton":
        return cpu
    from beit_fast.kernels.mim_loss import kernel

    return kernel


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _column_sum(matrix: Tensor) -> Tensor:
    """(M, V) -> (V,) in at least fp32; on a CPU as a product with ones, which is twice as fast as `sum(0)`."""
    wide = _wide(matrix.dtype)
    if matrix.device.type == "cpu" and matrix.dtype == wide:
        return column_sums(matrix)
    return matrix.sum(0, dtype=wide)


def _scaled_product(left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    """factor (0-d) times left @ right, in at least fp32; half precision is never rounded between the two."""
    if left.device.type == "cpu" or left.dtype == torch.float32:
        wide = _wide(left.dtype)
        return matmul(left.to(wide), right.to(wide) * factor.to(wide))
    return wide_product(left, right).mul_(factor)


def _fake(
    hidden: Tensor, rows: Tensor, _t: Tensor, _w: Tensor, _b: Tensor, head_weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, compute, with_gradient, _ = others
    wide, M = _wide(hidden.dtype), rows.shape[0] if with_gradient else 0
    return (
        hidden.new_empty((), dtype=_wide(compute)),
        rows.new_empty(()),
        hidden.new_empty((M, head_weight.shape[0]) if with_gradient else 0, dtype=compute),
        hidden.new_empty((M, hidden.shape[1]) if with_gradient else 0, dtype=compute),
        hidden.new_empty(M, dtype=wide),
        hidden.new_empty(M, dtype=wide),
    )


@fused_op("beit_fast::masked_cross_entropy", fake=_fake)
def _masked_cross_entropy(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    eps: float,
    num_targets: Tensor,
    compute: torch.dtype,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, num_correct; for backward d(sum)/d(logits) (M, V), the normed rows (M, D), their mean and 1/std (M,)."""
    steps = _steps(backend)
    normed, mean, rstd = steps.gather_norm(hidden, rows, norm_weight, norm_bias, eps, compute)
    logits = matmul(normed, head_weight.to(compute).t(), head_bias.to(compute))
    losses, hits = steps.cross_entropy_(logits, targets, with_gradient)
    if not with_gradient:
        logits, normed, mean, rstd = (tensor.new_empty(0) for tensor in (logits, normed, mean, rstd))
    return losses.sum() / num_targets.to(losses.dtype), hits.sum(), logits, normed, mean, rstd


def _backward_fake(
    _f: Tensor, _g: Tensor, normed: Tensor, _m: Tensor, _r: Tensor, hidden: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, head_weight, _ = others
    (V, D), wide = head_weight.shape, _wide(normed.dtype)
    grad_norm_weight, grad_norm_bias = (hidden.new_empty(D, dtype=_wide(hidden.dtype)) for _ in range(2))
    grad_head_weight, grad_head_bias = hidden.new_empty((V, D), dtype=wide), hidden.new_empty(V, dtype=wide)
    return hidden.new_empty(hidden.shape), grad_norm_weight, grad_norm_bias, grad_head_weight, grad_head_bias


@fused_op("beit_fast::masked_cross_entropy_backward", fake=_backward_fake)
def _masked_cross_entropy_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, norm_weight, norm_bias, head_weight, head_bias); factor = d(loss) / num_targets."""
    grad_head_weight = _scaled_product(grad_logits.t(), normed, factor)
    grad_head_bias = _column_sum(grad_logits) * factor
    grad_normed = matmul(grad_logits, head_weight.to(normed.dtype))
    grad_hidden, grad_norm_weight, grad_norm_bias = _steps(backend).gather_norm_backward(
        grad_normed, factor, hidden, rows, targets, mean, rstd, norm_weight
    )
    return grad_hidden, grad_norm_weight, grad_norm_bias, grad_head_weight, grad_head_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, _, num_targets, *_, ctx.backend = inputs
    _, num_correct, grad_logits, normed, mean, rstd = output
    ctx.mark_non_differentiable(num_correct, grad_logits, normed, mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for those either, one of which is (M, V)
    ctx.dtypes = [tensor.dtype for tensor in (hidden, norm_weight, norm_bias, head_weight, head_bias)]
    ctx.save_for_backward(grad_logits, normed, mean, rstd, hidden, rows, targets, norm_weight, head_weight, num_targets)


@_masked_cross_entropy.backward(_save)
def _gradients(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    *saved, num_targets = ctx.saved_tensors
    inputs: Any = (grad_loss / num_targets, *saved, ctx.backend)
    grads = _masked_cross_entropy_backward(*inputs)
    hidden, *others = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
    return hidden, None, None, *others, None, None, None, None, None
