# mypy: allow-untyped-defs
"""Triton kernels around the head of masked image modelling; its matrix products are cuBLAS's.

`cross_entropy` works in place: loss, hit and gradient in one read and one write of the logits, which is all the memory
traffic they cost beside the products. No atomics, nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.tiles import narrow

IGNORED = tl.constexpr(-100)


@triton.jit
def gather_norm_kernel(
    hidden_ptr, rows_ptr, weight_ptr, bias_ptr, normed_ptr, mean_ptr, rstd_ptr, D, eps, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    inside = cols < D
    x = tl.load(hidden_ptr + row * D + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / D
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    normed = narrow(centred * rstd * weight + bias, normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + index * D + cols, normed, mask=inside)
    tl.store(mean_ptr + index, mean)
    tl.store(rstd_ptr + index, rstd)


def gather_norm(
    hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of hidden[rows]: (M, D) as `dtype`; mean and 1/std (M,) fp32."""
    M, D = rows.shape[0], hidden.shape[1]
    normed = hidden.new_empty((M, D), dtype=dtype)
    mean, rstd = (hidden.new_empty(M, dtype=torch.float32) for _ in range(2))
    if M > 0:
        block = triton.next_power_of_2(D)
        launch(
            gather_norm_kernel, (M,),
            hidden.contiguous(), rows.contiguous(), weight, bias, normed, mean, rstd, D, eps, BLOCK=block,
            **launch_config("gather_norm_forward", hidden.device, block),
        )  # fmt: skip
    return normed, mean, rstd


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, loss_ptr, hit_ptr, V, GRADIENT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + index * V
    target = tl.load(targets_ptr + index)
    valid = target != IGNORED
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    at_target = tl.load(row_ptr + target, mask=valid, other=0.0).to(tl.float32)
    if WHOLE:  # the row stays in registers
        inside = cols < V
        x = tl.load(row_ptr + cols, mask=inside, other=-float("inf")).to(tl.float32)
        m_i = tl.max(x, 0)
        best = tl.min(tl.where(x == m_i, cols, V), 0)  # ties: the lowest index, as torch
        x = tl.exp(x - m_i)
        l_i = tl.sum(x, 0)
    else:
        m_i = -float("inf")
        l_i = 0.0
        best = 0
        for start in range(0, V, BLOCK):
            inside = start + cols < V
            x = tl.load(row_ptr + start + cols, mask=inside, other=-float("inf")).to(tl.float32)
            m_block = tl.max(x, 0)
            first = start + tl.min(tl.where(x == m_block, cols, BLOCK), 0)
            best = tl.where(m_block > m_i, first, best)
            m_new = tl.maximum(m_i, m_block)
            alpha = tl.exp(m_i - m_new)
            l_i = l_i * alpha + tl.sum(tl.exp(x - m_new), 0)
            m_i = m_new
    tl.store(loss_ptr + index, tl.where(valid, m_i + tl.log(l_i) - at_target, 0.0))
    tl.store(hit_ptr + index, (valid & (best == target)).to(tl.int32))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before any thread writes its gradient over it
        scale = tl.where(valid, 1.0 / l_i, 0.0)
        if WHOLE:
            grad = x * scale - tl.where(cols == target, 1.0, 0.0)
            tl.store(row_ptr + cols, narrow(grad, logits_ptr.dtype.element_ty), mask=inside)
        else:
            for start in range(0, V, BLOCK):
                inside = start + cols < V
                x = tl.load(row_ptr + start + cols, mask=inside, other=-float("inf")).to(tl.float32)
                grad = tl.exp(x - m_i) * scale - tl.where(start + cols == target, 1.0, 0.0)
                tl.store(row_ptr + start + cols, narrow(grad, logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Per row of logits (M, V) the cross entropy fp32 and the hit int32; the gradient in place if `with_gradient`."""
    M, V = logits.shape
    loss, hit = logits.new_empty(M, dtype=torch.float32), logits.new_empty(M, dtype=torch.int32)
    if M > 0:
        config = dict(launch_config("cross_entropy", logits.device))
        block = config.pop("BLOCK")
        launch(
            cross_entropy_kernel, (M,),
            logits, targets.contiguous(), loss, hit, V, GRADIENT=with_gradient, WHOLE=block >= V,
            BLOCK=min(block, triton.next_power_of_2(V)), **config,
        )  # fmt: skip
    return loss, hit


@triton.jit
def gather_norm_backward_kernel(
    grad_normed_ptr, factor_ptr, hidden_ptr, rows_ptr, targets_ptr, mean_ptr, rstd_ptr, weight_ptr,
    grad_hidden_ptr, partial_ptr, M, D, plane, BLOCK: tl.constexpr,
):  # fmt: skip
    # Rows p, p + P, ... of program p, in that order; padding rows write nothing, so no row of hidden is written twice.
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    inside = cols < D
    factor = tl.load(factor_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    for turn in range(tl.program_id(0), M, tl.num_programs(0)):
        index = tl.cast(turn, tl.int64)
        row = tl.load(rows_ptr + index)
        valid = tl.load(targets_ptr + index) != IGNORED
        upstream = tl.load(grad_normed_ptr + index * D + cols, mask=inside & valid, other=0.0).to(tl.float32) * factor
        x = tl.load(hidden_ptr + row * D + cols, mask=inside & valid, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + index)
        unit = tl.where(inside & valid, (x - tl.load(mean_ptr + index)) * rstd, 0.0)
        sum_weight += upstream * unit
        sum_bias += upstream
        upstream *= weight
        along = tl.sum(upstream * unit, 0) / D
        level = tl.sum(upstream, 0) / D
        grad = narrow((upstream - unit * along - level) * rstd, grad_hidden_ptr.dtype.element_ty)
        tl.store(grad_hidden_ptr + row * D + cols, grad, mask=inside & valid)
    mine = partial_ptr + tl.program_id(0).to(tl.int64) * D + cols
    tl.store(mine, sum_weight, mask=inside)
    tl.store(mine + plane, sum_bias, mask=inside)


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
    M, D = grad_normed.shape
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    if M == 0:
        return grad_hidden, hidden.new_zeros(D, dtype=torch.float32), hidden.new_zeros(D, dtype=torch.float32)
    block = triton.next_power_of_2(D)
    config = dict(launch_config("gather_norm_backward", hidden.device, block))
    programs = min(config.pop("PROGRAMS"), M)
    partial = hidden.new_empty((2, programs, D), dtype=torch.float32)
    launch(
        gather_norm_backward_kernel, (programs,),
        grad_normed.contiguous(), factor, hidden.contiguous(), rows.contiguous(), targets.contiguous(), mean, rstd,
        weight, grad_hidden, partial, M, D, programs * D, BLOCK=block, **config,
    )  # fmt: skip
    return grad_hidden, partial[0].sum(0), partial[1].sum(0)
