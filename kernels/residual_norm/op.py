"""`residual_layer_norm` and `residual_add`: schema, dispatch, CPU kernel, autograd."""

from typing import Any

import torch
from torch import Tensor

from beit_fast.kernels.backend import chosen_backend, triton_runs
from beit_fast.kernels.registration import differentiable_op, plain_op
from beit_fast.kernels.residual_norm import reference


def residual_add(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: Tensor | None, branch_bias: Tensor | None = None
) -> Tensor:
    """Residual connection with LayerScale and stochastic depth: x + drop_path[b] * gamma * (branch + branch_bias).

    Args:
        x: (B, N, D), the residual stream.
        branch: (B, N, D), what attention or MLP gave; may be of a narrower dtype than x.
        gamma: (D,) LayerScale (Touvron et al. 2021, eq. 4), or None.
        drop_path: (B,) 0 or 1/keep per sample (Huang et al. 2016), or None; gets no gradient.
        branch_bias: (D,) bias of the linear layer that gave `branch`, where that layer did not add it, or None.

    Returns:
        (B, N, D) of the dtype of x.
    """
    _check(x, branch, gamma, drop_path, branch_bias)
    if chosen_backend() == "reference":
        return reference.residual_add(x, branch, gamma, drop_path, branch_bias)
    return _add(x, branch, gamma, drop_path, branch_bias)


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual_add`, and the LayerNorm of the sum in the same pass.

    Args:
        x: (B, N, D), the residual stream.
        branch: (B, N, D), what attention or MLP gave.
        gamma: (D,) LayerScale, or None.
        drop_path: (B,) 0 or 1/keep per sample, or None.
        weight: (D,) of the LayerNorm.
        bias: (D,) of the LayerNorm.
        eps: added to the variance.
        branch_bias: (D,) bias of the linear layer that gave `branch`, where that layer did not add it, or None.

    Returns:
        sum (B, N, D) of the dtype of x, and LayerNorm(sum) (B, N, D) of the dtype of branch.

    Raises:
        ValueError: a shape does not fit.

    Examples:
        >>> import torch
        >>> from beit_fast.kernels import residual_layer_norm
        >>> x, branch, gamma = torch.ones(2, 5, 8), torch.ones(2, 5, 8), torch.full((8,), 0.1)
        >>> total, normed = residual_layer_norm(x, branch, gamma, None, torch.ones(8), torch.zeros(8))
        >>> float(total[0, 0, 0]), float(normed.abs().max())
        (1.100000023841858, 0.0)
    """
    _check(x, branch, gamma, drop_path, branch_bias, weight, bias)
    if chosen_backend() == "reference":
        return reference.residual_layer_norm(x, branch, gamma, drop_path, weight, bias, eps, branch_bias)
    total, normed, _, _ = _norm(x, branch, gamma, drop_path, weight, bias, eps, branch_bias)
    return total, normed


def _check(x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: Tensor | None, *vectors: Tensor | None) -> None:
    if x.dim() != 3 or branch.shape != x.shape:
        raise ValueError(f"x and branch must both be (B, N, D), got {tuple(x.shape)} and {tuple(branch.shape)}")
    if drop_path is not None and drop_path.shape != x.shape[:1]:
        raise ValueError(f"drop_path must be (B,) = ({x.shape[0]},), got {tuple(drop_path.shape)}")
    for vector in (gamma, *vectors):
        if vector is not None and vector.shape != x.shape[2:]:
            raise ValueError(
                f"gamma, weight, bias and branch_bias must be (D,) = ({x.shape[2]},), got {tuple(vector.shape)}"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scale(gamma: Tensor | None, drop_path: Tensor | None) -> Tensor | None:
    """drop_path * gamma, of a shape that broadcasts against (B, N, D)."""
    if drop_path is None:
        return gamma
    return drop_path[:, None, None] if gamma is None else drop_path[:, None, None] * gamma


# The sum


def _add_impl(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: Tensor | None, branch_bias: Tensor | None
) -> Tensor:
    if triton_runs(x):
        from beit_fast.kernels.residual_norm import kernel

        return kernel.residual_add_forward(x, branch, gamma, drop_path, branch_bias)
    return _sum(x, branch, gamma, drop_path, branch_bias)


def _sum(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: Tensor | None, branch_bias: Tensor | None
) -> Tensor:
    wide = _wide(x.dtype)
    wide_x, branch = x.contiguous().to(wide), branch.contiguous().to(wide)
    scale = _scale(gamma, drop_path)
    if scale is None:
        total = wide_x + branch
        if branch_bias is not None:
            total += branch_bias
    else:
        scale = scale.to(wide)
        total = torch.addcmul(wide_x, branch, scale)
        if branch_bias is not None:
            total += scale * branch_bias  # (B, 1, D) at the most: cheaper than adding it to the branch
    return total.to(x.dtype)


def _add_fake(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: Tensor | None, branch_bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


def _add_backward_impl(
    grad: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (branch, gamma, branch_bias); an empty tensor where `needs` says no."""
    if triton_runs(grad):
        from beit_fast.kernels.residual_norm import kernel

        return kernel.residual_add_backward(grad, branch, gamma, drop_path, branch_bias, branch_dtype, needs)
    wide = grad.contiguous().to(_wide(grad.dtype))
    return _branch_gradients(wide, branch, gamma, drop_path, branch_bias, branch_dtype, needs)


def _branch_gradients(
    grad: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """From d(sum), contiguous and wide: the gradients of branch, gamma and branch_bias."""
    need_branch, need_gamma, need_bias = needs
    grad_branch, grad_gamma, grad_bias = (grad.new_empty(0, dtype=t) for t in (branch_dtype, grad.dtype, grad.dtype))
    if need_branch:
        scale = _scale(gamma, drop_path)
        grad_branch = grad.to(branch_dtype, copy=True) if scale is None else (grad * scale).to(branch_dtype)
    if need_gamma or need_bias:
        factors = grad.new_ones(grad.shape[:2].numel())
        if drop_path is not None:
            factors = drop_path.to(grad.dtype).repeat_interleave(grad.shape[1])
        rows = grad.flatten(0, 1)
        columns = factors @ rows if need_bias or branch_bias is not None else None  # faster than a sum over rows
        if need_gamma:
            assert branch is not None
            grad_gamma = _weighted_column_sum(rows, branch.flatten(0, 1).to(grad.dtype), factors)
            if columns is not None and branch_bias is not None:
                grad_gamma += columns * branch_bias
        if need_bias:
            assert columns is not None
            grad_bias = columns if gamma is None else columns * gamma
    return [grad_branch, grad_gamma, grad_bias]


def _weighted_column_sum(grad: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
    """The sum over rows of factors * grad * branch, all (R, D), without a temporary of their size.

    It is the weight gradient of a LayerNorm of mean 0 and 1/std `factors`, which torch reduces in one pass.
    """
    width = grad.shape[-1]
    zeros, weight = torch.zeros_like(factors), grad.new_ones(width)
    _, weighted, _ = torch.ops.aten.native_layer_norm_backward(
        grad, branch, [width], zeros, factors, weight, None, [False, True, False]
    )
    return weighted


def _add_backward_fake(
    grad: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    return _fake_branch_gradients(grad, branch_dtype, needs)


def _fake_branch_gradients(grad: Tensor, branch_dtype: torch.dtype, needs: list[bool]) -> list[Tensor]:
    wide, width = _wide(grad.dtype), grad.shape[-1]
    shapes: list[Any] = [grad.shape, (width,), (width,)]
    dtypes = [branch_dtype, wide, wide]
    return [
        grad.new_empty(shape if need else 0, dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    ]


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gamma, drop_path, branch_bias = inputs
    ctx.branch_dtype = branch.dtype
    keep = branch if gamma is not None and ctx.needs_input_grad[2] else None
    ctx.save_for_backward(keep, gamma, drop_path, branch_bias)


def _add_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, gamma, drop_path, branch_bias = ctx.saved_tensors
    need_x, *needs = (ctx.needs_input_grad[i] for i in (0, 1, 2, 4))
    plain = gamma is None and drop_path is None and ctx.branch_dtype == grad.dtype
    needs[0] = needs[0] and not plain
    grads: list[Tensor | None] = [None, None, None]
    if any(needs):
        found = _add_backward(grad, branch, gamma, drop_path, branch_bias, ctx.branch_dtype, needs)
        grads = [g if need else None for g, need in zip(found, needs, strict=True)]
    if plain and ctx.needs_input_grad[1]:
        grads[0] = grad
    return grad if need_x else None, grads[0], _like(grads[1], gamma), None, _like(grads[2], branch_bias)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


_add_backward = plain_op("residual_add_backward", _add_backward_impl, _add_backward_fake)
_add = differentiable_op("residual_add", _add_impl, _add_fake, _add_setup, _add_autograd)


# The sum and its LayerNorm


def _norm_impl(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum, normed, and of every row the mean and 1/std (B, N, 1) for the backward pass."""
    if triton_runs(x):
        from beit_fast.kernels.residual_norm import kernel

        return kernel.residual_layer_norm_forward(x, branch, gamma, drop_path, weight, bias, eps, branch_bias)
    total = _sum(x, branch, gamma, drop_path, branch_bias)
    wide = _wide(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(total.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return total, normed.to(branch.dtype), mean, rstd


def _norm_fake(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (*x.shape[:2], 1)
    wide = _wide(x.dtype)
    return x.new_empty(x.shape), branch.new_empty(x.shape), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _norm_backward_impl(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, branch, gamma, weight, bias, branch_bias); empty where `needs` says no (x: always given)."""
    if triton_runs(total):
        from beit_fast.kernels.residual_norm import kernel

        return kernel.residual_layer_norm_backward(
            grad_total, grad_normed, total, mean, rstd, weight, branch, gamma, drop_path, branch_bias,
            grad_normed.dtype, needs,
        )  # fmt: skip
    wide = _wide(total.dtype)
    _, need_branch, need_gamma, need_weight, need_bias, need_branch_bias = needs
    weight = weight.to(wide)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.contiguous().to(wide), total.to(wide), total.shape[-1:], mean, rstd, weight, weight,
        [True, need_weight, need_bias],
    )  # fmt: skip
    if grad_total is not None:
        grad += grad_total
    grad_branch, grad_gamma, grad_branch_bias = _branch_gradients(
        grad, branch, gamma, drop_path, branch_bias, grad_normed.dtype, [need_branch, need_gamma, need_branch_bias]
    )
    return [
        grad.to(total.dtype),
        grad_branch,
        grad_gamma,
        grad_weight if need_weight else grad.new_empty(0),
        grad_bias if need_bias else grad.new_empty(0),
        grad_branch_bias,
    ]


def _norm_backward_fake(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    _, need_branch, need_gamma, need_weight, need_bias, need_branch_bias = needs
    wide, width = _wide(total.dtype), total.shape[-1]
    grad_branch, grad_gamma, grad_branch_bias = _fake_branch_gradients(
        total, grad_normed.dtype, [need_branch, need_gamma, need_branch_bias]
    )
    grad_weight, grad_bias = (total.new_empty(width if need else 0, dtype=wide) for need in (need_weight, need_bias))
    return [total.new_empty(total.shape), grad_branch, grad_gamma, grad_weight, grad_bias, grad_branch_bias]


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gamma, drop_path, weight, bias, _, branch_bias = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = branch.dtype
    keep = branch if gamma is not None and ctx.needs_input_grad[2] else None
    ctx.save_for_backward(total, mean, rstd, weight, bias, keep, gamma, drop_path, branch_bias)


def _norm_autograd(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, bias, branch, gamma, drop_path, branch_bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5, 7)]
    if grad_total is None and grad_normed is None:
        return (None,) * 8
    if grad_normed is None:  # nothing downstream read the norm
        grad_normed = total.new_zeros(total.shape, dtype=ctx.branch_dtype)
    # with neither LayerScale nor stochastic depth the sum passes one gradient to both its terms
    plain = gamma is None and drop_path is None and ctx.branch_dtype == total.dtype
    asked = [True, needs[1] and not plain, *needs[2:]]
    found = _norm_backward(
        grad_normed, grad_total, total, mean, rstd, weight, branch, gamma, drop_path, branch_bias, asked
    )
    dx, dbranch, dgamma, dweight, dbias, dbranch_bias = (
        g if need else None for g, need in zip(found, asked, strict=True)
    )
    if plain and needs[1]:
        dbranch = dx
    return (
        dx if needs[0] else None,
        dbranch,
        _like(dgamma, gamma),
        None,
        _like(dweight, weight),
        _like(dbias, bias),
        None,
        _like(dbranch_bias, branch_bias),
    )


_norm_backward = plain_op("residual_layer_norm_backward", _norm_backward_impl, _norm_backward_fake)
_norm = differentiable_op("residual_layer_norm", _norm_impl, _norm_fake, _norm_setup, _norm_autograd)
