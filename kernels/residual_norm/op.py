"""The operations `residual_add` and `residual_layer_norm`: one op, whose LayerNorm may be left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit_fast.kernels import compiled
from beit_fast.kernels.backend import compiled_serves, select
from beit_fast.kernels.registration import fused_op, is_traced
from beit_fast.kernels.residual_norm import cpu, reference


def residual_add(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Residual connection with LayerScale and stochastic depth: x + drop_path[b] * gamma * (branch + branch_bias).

    Args:
        x: (B, N, D), the residual stream.
        branch: (B, N, D), what attention or MLP gave, or (K, N, D) of `kept`; may be of a narrower dtype than x.
        gamma: (D,) LayerScale (Touvron et al. 2021, eq. 4), or None.
        drop_path: (B,) 0 or 1/keep per sample (Huang et al. 2016), or None; gets no gradient.
        branch_bias: (D,) bias of the linear layer that gave `branch`, where that layer did not add it, or None.
        kept: (K,) int64, ascending: the samples that `branch` has, where it lacks some that `drop_path` makes 0; for
            these it counts as 0.

    Returns:
        (B, N, D) of the dtype of x.

    Raises:
        ValueError: a shape does not fit, or `kept` is not ascending (seen on a CPU only).
    """
    _check(x, branch, gamma, drop_path, kept, branch_bias)
    backend = select("residual_add", x)
    if kept is not None and backend != "cpu":
        branch, kept = cpu.whole(x, branch, kept), None
    if backend == "reference":
        return reference.residual_add(x, branch, gamma, drop_path, branch_bias)
    return _residual_norm(x, branch, gamma, drop_path, None, None, 0.0, branch_bias, kept, backend)[0]


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual_add`, and the LayerNorm of the sum in the same pass.

    Args:
        x: (B, N, D), the residual stream.
        branch: (B, N, D), what attention or MLP gave, or (K, N, D) of `kept`.
        gamma: (D,) LayerScale, or None.
        drop_path: (B,) 0 or 1/keep per sample, or None.
        weight: (D,) of the LayerNorm.
        bias: (D,) of the LayerNorm.
        eps: added to the variance.
        branch_bias: (D,) bias of the linear layer that gave `branch`, where that layer did not add it, or None.
        kept: (K,) int64, ascending: the samples that `branch` has, where it lacks some that `drop_path` makes 0; for
            these it counts as 0.

    Returns:
        sum (B, N, D) of the dtype of x, and LayerNorm(sum) (B, N, D) of the dtype of branch.

    Raises:
        ValueError: a shape does not fit, or `kept` is not ascending (seen on a CPU only).

    Examples:
        >>> import torch
        >>> from beit_fast.kernels import residual_layer_norm
        >>> x, branch, gamma = torch.ones(2, 5, 8), torch.ones(2, 5, 8), torch.full((8,), 0.1)
        >>> total, normed = residual_layer_norm(x, branch, gamma, None, torch.ones(8), torch.zeros(8))
        >>> float(total[0, 0, 0]), float(normed.abs().max())
        (1.100000023841858, 0.0)
    """
    _check(x, branch, gamma, drop_path, kept, branch_bias, weight, bias)
    backend = select("residual_layer_norm", x)
    if kept is not None and backend != "cpu":
        branch, kept = cpu.whole(x, branch, kept), None
    if backend == "reference":
        return reference.residual_layer_norm(x, branch, gamma, drop_path, weight, bias, eps, branch_bias)
    total, normed, _, _ = _residual_norm(x, branch, gamma, drop_path, weight, bias, eps, branch_bias, kept, backend)
    return total, normed


def _check(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    kept: Tensor | None,
    *vectors: Tensor | None,
) -> None:
    samples = x.shape[:1] if kept is None else kept.shape
    if x.dim() != 3 or branch.shape != (*samples, *x.shape[1:]):
        raise ValueError(
            "x and branch must both be (B, N, D), and branch (K, N, D) where kept is (K,), got "
            f"{tuple(x.shape)} and {tuple(branch.shape)}"
        )
    if kept is not None and drop_path is None:
        raise ValueError("kept says which samples drop_path keeps: pass drop_path, too")
    if kept is not None and kept.device.type == "cpu" and not is_traced(kept):  # elsewhere it would be a host sync
        samples_kept = kept.tolist()
        if samples_kept != sorted(set(samples_kept).intersection(range(x.shape[0]))):
            raise ValueError(f"kept must be ascending indices of the {x.shape[0]} samples, got {samples_kept}")
    if drop_path is not None and drop_path.shape != x.shape[:1]:
        raise ValueError(f"drop_path must be (B,) = ({x.shape[0]},), got {tuple(drop_path.shape)}")
    for vector in (gamma, *vectors):
        if vector is not None and vector.shape != x.shape[2:]:
            raise ValueError(
                f"gamma, weight, bias and branch_bias must be (D,) = ({x.shape[2]},), got {tuple(vector.shape)}"
            )


def _fake(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: Tensor | None, weight: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows: Any = 0 if weight is None else (*x.shape[:2], 1)
    mean, rstd = x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)
    return x.new_empty(x.shape), branch.new_empty(0 if weight is None else x.shape), mean, rstd


@fused_op("beit_fast::residual_norm", fake=_fake)
def _residual_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    kept: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum, normed, and of every row the mean and 1/std (B, N, 1); the last three empty where weight is None."""
    if backend == "triton":
        from beit_fast.kernels.residual_norm import kernel

        return kernel.residual_norm(x, branch, gamma, drop_path, weight, bias, eps, branch_bias)
    on_cpu = compiled if compiled_serves(x, branch, gamma, drop_path, weight, bias, branch_bias) else cpu
    return on_cpu.residual_norm(x, branch, gamma, drop_path, weight, bias, eps, branch_bias, kept)


def _backward_fake(grad_total: Tensor, grad_normed: Tensor | None, total: Tensor, *others: Any) -> list[Tensor]:
    *_, kept, branch_dtype, needs, _ = others
    stream = grad_total if grad_normed is None else total
    wide, width = torch.promote_types(stream.dtype, torch.float32), stream.shape[-1:]
    samples = stream.shape[:1] if kept is None else kept.shape
    shapes = [stream.shape, (*samples, *stream.shape[1:]), *[width] * 4]
    dtypes = [stream.dtype, branch_dtype, *[wide] * 4]
    made = [grad_normed is not None, *needs[1:]]
    return [
        stream.new_empty(shape if need else 0, dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, made, strict=True)
    ]


@fused_op("beit_fast::residual_norm_backward", fake=_backward_fake)
def _residual_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    kept: Tensor | None,
    branch_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of (x, branch, gamma, weight, bias, branch_bias); empty where `needs` says no.

    That of x is empty where there is no `grad_normed`: it is then `grad_total`, and nothing but the gradients of the
    others is made.
    """
    given = (grad_total, grad_normed, total, mean, rstd, weight, branch, gamma, drop_path, branch_bias)
    if backend == "triton":
        from beit_fast.kernels.residual_norm import kernel

        return kernel.residual_norm_backward(*given, branch_dtype, needs)
    stream = grad_total if grad_normed is None else grad_normed
    assert stream is not None
    others = (grad_total, total, weight, branch, gamma, drop_path, branch_bias)
    if branch_dtype is torch.float32 and compiled_serves(stream, *others):
        return compiled.residual_norm_backward(*given, kept, needs)
    return cpu.residual_norm_backward(*given, kept, branch_dtype, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gamma, drop_path, weight, bias, _, branch_bias, kept, ctx.backend = inputs
    total, normed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *(() if weight is not None else (normed,)))
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = branch.dtype
    read = branch if gamma is not None and ctx.needs_input_grad[2] else None
    norm = (None, None, None) if weight is None else (total, mean, rstd)
    ctx.save_for_backward(*norm, weight, bias, read, gamma, drop_path, branch_bias, kept)


@_residual_norm.backward(_save)
def _gradients(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, bias, branch, gamma, drop_path, branch_bias, kept = ctx.saved_tensors
    if grad_total is None and grad_normed is None:
        return (None,) * 10
    if grad_normed is None and weight is not None:  # nothing downstream read the norm
        grad_normed = total.new_zeros(total.shape, dtype=ctx.branch_dtype)
    need = ctx.needs_input_grad
    needs = [need[0], need[1], need[2], need[4], need[5], need[7]]
    # with neither LayerScale nor stochastic depth the sum passes one gradient to both its terms
    stream = (grad_total if weight is None else total).dtype  # type: ignore[union-attr]
    shared = gamma is None and drop_path is None and ctx.branch_dtype == stream
    asked = [needs[0], needs[1] and not shared, *needs[2:]]
    grads: list[Any] = [None] * 6
    if weight is not None or any(asked[1:]):
        saved = (total, mean, rstd, weight, branch, gamma, drop_path, branch_bias, kept)
        grads[:] = _residual_norm_backward(grad_total, grad_normed, *saved, ctx.branch_dtype, asked, ctx.backend)
    grad_x = grad_total if weight is None else grads[0]
    return (
        grad_x if needs[0] else None,
        (grad_x if shared else grads[1]) if needs[1] else None,
        grads[2].to(gamma.dtype) if needs[2] else None,
        None,
        grads[3].to(weight.dtype) if needs[3] else None,
        grads[4].to(bias.dtype) if needs[4] else None,
        None,
        grads[5].to(branch_bias.dtype) if needs[5] else None,
        None,
        None,
    )
