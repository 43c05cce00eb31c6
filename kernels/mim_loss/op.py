"""`masked_cross_entropy`: schema, dispatch, CPU kernel, autograd."""

from typing import Any

import torch
from torch import Tensor

from beit_fast.kernels.backend import chosen_backend, triton_runs
from beit_fast.kernels.matmul import matmul
from beit_fast.kernels.mim_loss import cpu, reference
from beit_fast.kernels.mim_loss.cpu import IGNORED
from beit_fast.kernels.registration import differentiable_op, plain_op


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
    chunk_rows: int | None = None,
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
        chunk_rows: work on that many rows at a time, so that at most (chunk_rows, V) logits exist; the gradients of
            the head are then made in the forward pass. None: all rows at once, which is faster on a GPU.

    Returns:
        loss, 0-d, at least fp32; and the number of rows predicted right, 0-d int64. No host synchronisation.

    Raises:
        ValueError: a shape does not fit, or `chunk_rows` is less than 1.

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
    if chosen_backend() == "reference":
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
    common = (hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, eps, num_targets, compute)
    if chunk_rows is None:
        loss, num_correct, *_ = _loss(*common, with_gradient)
    else:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        loss, num_correct, *_ = _chunked(*common, chunk_rows, with_gradient)
    return loss, num_correct


def _steps(hidden: Tensor) -> Any:
    """The module whose `gather_norm`, `cross_entropy_` and `scatter_norm_backward` serve this tensor."""
    if not triton_runs(hidden):
        return cpu
    from beit_fast.kernels.mim_loss import kernel

    return kernel


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _column_sum(matrix: Tensor) -> Tensor:
    """(M, V) -> (V,) in at least fp32; on a CPU as a product with ones, which is twice as fast as `sum(0)`."""
    wide = _wide(matrix.dtype)
    if matrix.device.type == "cpu" and matrix.dtype == wide:
        return matrix.new_ones(matrix.shape[0]) @ matrix
    return matrix.sum(0, dtype=wide)


def _product(left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    """factor (0-d) times left @ right, in at least fp32; half precision is never rounded between the two."""
    if left.device.type == "cpu" or left.dtype == torch.float32:
        wide = _wide(left.dtype)
        return matmul(left.to(wide), right.to(wide) * factor.to(wide))
    return torch.mm(left, right, out_dtype=torch.float32).mul_(factor)


def _loss_impl(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, num_correct; for backward d(sum)/d(logits) (M, V), the normed rows (M, D), their mean and 1/std (M,)."""
    steps = _steps(hidden)
    normed, mean, rstd = steps.gather_norm(hidden, rows, norm_weight, norm_bias, eps, compute)
    logits = matmul(normed, head_weight.to(compute).t(), head_bias.to(compute))
    losses, hits = steps.cross_entropy_(logits, targets, with_gradient)
    if not with_gradient:
        logits, normed, mean, rstd = (tensor.new_empty(0) for tensor in (logits, normed, mean, rstd))
    return losses.sum() / num_targets.to(losses.dtype), hits.sum(), logits, normed, mean, rstd


def _loss_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, M = _wide(hidden.dtype), rows.shape[0]
    shape, saved = ((M, head_weight.shape[0]), (M, hidden.shape[1])), (M,)
    return (
        hidden.new_empty((), dtype=_wide(compute)),
        rows.new_empty(()),
        hidden.new_empty(shape[0] if with_gradient else 0, dtype=compute),
        hidden.new_empty(shape[1] if with_gradient else 0, dtype=compute),
        hidden.new_empty(saved if with_gradient else 0, dtype=wide),
        hidden.new_empty(saved if with_gradient else 0, dtype=wide),
    )


def _loss_backward_impl(
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
    grad_head_weight = _product(grad_logits.t(), normed, factor)
    grad_head_bias = _column_sum(grad_logits) * factor
    grad_normed = matmul(grad_logits, head_weight.to(normed.dtype))
    grad_hidden, grad_norm_weight, grad_norm_bias = _steps(hidden).scatter_norm_backward(
        grad_normed, factor, hidden, rows, targets, mean, rstd, norm_weight
    )
    return grad_hidden, grad_norm_weight, grad_norm_bias, grad_head_weight, grad_head_bias


def _loss_backward_fake(
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
    V, D = head_weight.shape
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(D, dtype=_wide(hidden.dtype)),
        hidden.new_empty(D, dtype=_wide(hidden.dtype)),
        hidden.new_empty((V, D), dtype=_wide(normed.dtype)),
        hidden.new_empty(V, dtype=_wide(normed.dtype)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, _, num_targets, *_ = inputs
    _, num_correct, grad_logits, normed, mean, rstd = output
    ctx.mark_non_differentiable(num_correct, grad_logits, normed, mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for those either, one of which is (M, V)
    ctx.dtypes = [tensor.dtype for tensor in (hidden, norm_weight, norm_bias, head_weight, head_bias)]
    ctx.save_for_backward(grad_logits, normed, mean, rstd, hidden, rows, targets, norm_weight, head_weight, num_targets)


def _autograd(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 11
    *saved, num_targets = ctx.saved_tensors
    found = _loss_backward(grad_loss / num_targets, *saved)
    hidden, *others = (grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True))
    return hidden, None, None, *others, None, None, None, None


_loss_backward = plain_op("masked_cross_entropy_backward", _loss_backward_impl, _loss_backward_fake)
_loss = differentiable_op("masked_cross_entropy", _loss_impl, _loss_fake, _setup, _autograd)


# A chunk of rows at a time


def _chunked_impl(
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
    chunk_rows: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, num_correct; the gradients of the sum by the normed rows (M, D), head_weight, head_bias; mean, 1/std."""
    steps, wide = _steps(hidden), _wide(compute)
    normed, mean, rstd = steps.gather_norm(hidden, rows, norm_weight, norm_bias, eps, compute)
    head_weight, head_bias = head_weight.to(compute), head_bias.to(compute)
    grad_weight = head_weight.new_zeros(head_weight.shape if with_gradient else 0, dtype=wide)
    grad_bias = head_weight.new_zeros(head_weight.shape[0] if with_gradient else 0, dtype=wide)
    losses, hits, one = [], [], grad_bias.new_ones(())
    for some, target in zip(normed.split(chunk_rows), targets.split(chunk_rows), strict=True):
        logits = matmul(some, head_weight.t(), head_bias)
        loss, hit = steps.cross_entropy_(logits, target, with_gradient)
        losses.append(loss)
        hits.append(hit)
        if with_gradient:
            grad_bias += _column_sum(logits)
            if compute == wide:
                grad_weight.addmm_(logits.t(), some)
            else:
                grad_weight += _product(logits.t(), some, one)
            some.copy_(matmul(logits, head_weight))  # these rows are not read again
    grad_normed = normed
    if not with_gradient:
        grad_normed, mean, rstd = (tensor.new_empty(0) for tensor in (normed, mean, rstd))
    loss, num_correct = torch.cat(losses).sum() / num_targets.to(wide), torch.cat(hits).sum()
    return loss, num_correct, grad_normed, grad_weight, grad_bias, mean, rstd


def _chunked_fake(
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
    chunk_rows: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, M = _wide(compute), rows.shape[0]
    shapes: list[Any] = [(M, hidden.shape[1]), head_weight.shape, head_weight.shape[:1], (M,), (M,)]
    dtypes = [compute, wide, wide, _wide(hidden.dtype), _wide(hidden.dtype)]
    saved = (
        hidden.new_empty(shape if with_gradient else 0, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    grad_normed, grad_weight, grad_bias, mean, rstd = saved
    return hidden.new_empty((), dtype=wide), rows.new_empty(()), grad_normed, grad_weight, grad_bias, mean, rstd


def _chunked_backward_impl(
    factor: Tensor,
    grad_normed: Tensor,
    grad_head_weight: Tensor,
    grad_head_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, norm_weight, norm_bias, head_weight, head_bias); factor = d(loss) / num_targets."""
    grad_hidden, grad_norm_weight, grad_norm_bias = _steps(hidden).scatter_norm_backward(
        grad_normed, factor, hidden, rows, targets, mean, rstd, norm_weight
    )
    return grad_hidden, grad_norm_weight, grad_norm_bias, grad_head_weight * factor, grad_head_bias * factor


def _chunked_backward_fake(
    factor: Tensor,
    grad_normed: Tensor,
    grad_head_weight: Tensor,
    grad_head_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, wide = hidden.shape[1], _wide(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(D, dtype=wide),
        hidden.new_empty(D, dtype=wide),
        grad_head_weight.new_empty(grad_head_weight.shape),
        grad_head_bias.new_empty(grad_head_bias.shape),
    )


def _chunked_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, norm_weight, norm_bias, head_weight, head_bias, _, num_targets, *_ = inputs
    _, num_correct, *saved = output
    ctx.mark_non_differentiable(num_correct, *saved)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [tensor.dtype for tensor in (hidden, norm_weight, norm_bias, head_weight, head_bias)]
    ctx.save_for_backward(*saved, hidden, rows, targets, norm_weight, num_targets)


def _chunked_autograd(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    *saved, num_targets = ctx.saved_tensors
    found = _chunked_backward(grad_loss / num_targets, *saved)
    hidden, *others = (grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True))
    return hidden, None, None, *others, None, None, None, None, None


_chunked_backward = plain_op("chunked_masked_cross_entropy_backward", _chunked_backward_impl, _chunked_backward_fake)
_chunked = differentiable_op(
    "chunked_masked_cross_entropy", _chunked_impl, _chunked_fake, _chunked_setup, _chunked_autograd
)
