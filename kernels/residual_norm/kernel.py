# mypy: allow-untyped-defs
"""Triton kernels of the residual path: one pass over the rows forward, one backward.

A row of D elements stays in registers, masked up to the next power of two. The backward programs take the rows
p, p + P, ... in that order and leave one partial row each of every parameter gradient, summed afterwards: no atomics,
so two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.tiles import narrow


@triton.jit
def residual_norm_kernel(
    x_ptr, branch_ptr, gamma_ptr, drop_path_ptr, branch_bias_ptr, weight_ptr, bias_ptr,
    total_ptr, normed_ptr, mean_ptr, rstd_ptr, N, D, eps,
    HAS_GAMMA: tl.constexpr, HAS_DROP: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr, NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)  # [BLOCK], as all below
    inside = cols < D
    x = tl.load(x_ptr + row * D + cols, mask=inside, other=0.0).to(tl.float32)
    read = inside
    if HAS_DROP:
        factor = tl.load(drop_path_ptr + row // N).to(tl.float32)
        read = cols < tl.where(factor != 0.0, D, 0)  # a dropped branch is not even read
    update = tl.load(branch_ptr + row * D + cols, mask=read, other=0.0).to(tl.float32)
    if HAS_BRANCH_BIAS:
        update += tl.load(branch_bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_GAMMA:
        update *= tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_DROP:
        update *= factor
    total = narrow(x + update, total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * D + cols, total, mask=inside)
    if NORM:
        total = total.to(tl.float32)
        mean = tl.sum(total, 0) / D
        centred = tl.where(inside, total - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        normed = centred * rstd * weight + bias
        tl.store(normed_ptr + row * D + cols, narrow(normed, normed_ptr.dtype.element_ty), mask=inside)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum, normed (B, N, D), mean, 1/std (B, N, 1) fp32; the last three empty where weight is None."""
    B, N, D = x.shape
    x, branch = x.contiguous(), branch.contiguous()
    norm = weight is not None
    total = torch.empty_like(x)
    normed = branch.new_empty(x.shape if norm else 0)
    mean, rstd = (x.new_empty((B, N, 1) if norm else 0, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return total, normed, mean, rstd
    block = triton.next_power_of_2(D)
    launch(
        residual_norm_kernel, (B * N,),
        x, branch, _or(gamma, x), _or(drop_path, x), _or(branch_bias, x), _or(weight, x), _or(bias, x),
        total, normed, mean, rstd, N, D, eps,
        HAS_GAMMA=gamma is not None, HAS_DROP=drop_path is not None, HAS_BRANCH_BIAS=branch_bias is not None,
        NORM=norm, BLOCK=block, **launch_config("residual_norm_forward", x.device, block),
    )  # fmt: skip
    return total, normed, mean, rstd


@triton.jit
def residual_norm_backward_kernel(
    grad_total_ptr, grad_normed_ptr, total_ptr, mean_ptr, rstd_ptr, weight_ptr,
    branch_ptr, gamma_ptr, drop_path_ptr,
    grad_x_ptr, grad_branch_ptr, partial_ptr, R, N, D, plane,
    HAS_GRAD_TOTAL: tl.constexpr, HAS_DROP: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr,
    NORM: tl.constexpr, NEED_BRANCH: tl.constexpr, NEED_GAMMA: tl.constexpr, NEED_NORM: tl.constexpr,
    NEED_BRANCH_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)  # [BLOCK], as all below
    inside = cols < D
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    sum_gamma = tl.zeros([BLOCK], tl.float32)
    sum_branch = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.program_id(0), R, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        here = row * D + cols
        grad = tl.zeros([BLOCK], tl.float32)
        if HAS_GRAD_TOTAL:
            grad += tl.load(grad_total_ptr + here, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            upstream = tl.load(grad_normed_ptr + here, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row)
            rstd = tl.load(rstd_ptr + row)
            total = tl.load(total_ptr + here, mask=inside, other=0.0).to(tl.float32)
            unit = tl.where(inside, (total - mean) * rstd, 0.0)
            if NEED_NORM:
                sum_weight += upstream * unit
                sum_bias += upstream
            upstream *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            along = tl.sum(upstream * unit, 0) / D
            level = tl.sum(upstream, 0) / D
            grad += (upstream - unit * along - level) * rstd
            tl.store(grad_x_ptr + here, narrow(grad, grad_x_ptr.dtype.element_ty), mask=inside)
        read = inside
        if HAS_DROP:
            factor = tl.load(drop_path_ptr + row // N).to(tl.float32)
            read = cols < tl.where(factor != 0.0, D, 0)
            grad *= factor
        if NEED_BRANCH_BIAS or (NEED_GAMMA and HAS_BRANCH_BIAS):
            sum_branch += grad
        if NEED_GAMMA:
            sum_gamma += grad * tl.load(branch_ptr + here, mask=read, other=0.0).to(tl.float32)
        if NEED_BRANCH:
            if HAS_GAMMA:
                grad *= tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_branch_ptr + here, narrow(grad, grad_branch_ptr.dtype.element_ty), mask=inside)
    # planes of (P, D): weight, bias, gamma (without the share of branch_bias), branch_bias (without gamma)
    mine = partial_ptr + tl.program_id(0).to(tl.int64) * D + cols
    if NEED_NORM:
        tl.store(mine, sum_weight, mask=inside)
        tl.store(mine + plane, sum_bias, mask=inside)
    if NEED_GAMMA:
        tl.store(mine + 2 * plane, sum_gamma, mask=inside)
    if NEED_BRANCH_BIAS or (NEED_GAMMA and HAS_BRANCH_BIAS):
        tl.store(mine + 3 * plane, sum_branch, mask=inside)


@triton.jit
def residual_norm_finish_kernel(
    partial_ptr, gamma_ptr, branch_bias_ptr, grad_weight_ptr, grad_bias_ptr, grad_gamma_ptr, grad_branch_bias_ptr,
    P, D, plane,
    HAS_GAMMA: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr, NEED_GAMMA: tl.constexpr, NEED_NORM: tl.constexpr,
    NEED_BRANCH_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Program (j, k) adds up the P rows of plane k in the columns j.
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)  # [COLS]
    kind = tl.program_id(1)
    inside = cols < D
    wanted = kind < 0
    if NEED_NORM:
        wanted = wanted | (kind < 2)
    if NEED_GAMMA:
        wanted = wanted | (kind == 2)
    if NEED_BRANCH_BIAS:
        wanted = wanted | (kind == 3)
    if wanted:
        total = tl.zeros([ROWS, COLS], tl.float32)
        extra = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, P, ROWS):
            rows = start + tl.arange(0, ROWS)  # [ROWS]
            read = (rows < P)[:, None] & inside[None, :]
            here = partial_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :]
            total += tl.load(here + kind * plane, mask=read, other=0.0)
            if NEED_GAMMA and HAS_BRANCH_BIAS:
                extra += tl.load(here + 3 * plane, mask=read & (kind == 2), other=0.0)
        result = tl.sum(total, 0)
        if kind == 0:
            tl.store(grad_weight_ptr + cols, result, mask=inside)
        elif kind == 1:
            tl.store(grad_bias_ptr + cols, result, mask=inside)
        elif kind == 2:
            if HAS_BRANCH_BIAS:
                branch_bias = tl.load(branch_bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
                result += tl.sum(extra, 0) * branch_bias
            tl.store(grad_gamma_ptr + cols, result, mask=inside)
        else:
            if HAS_GAMMA:
                result *= tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_branch_bias_ptr + cols, result, mask=inside)


def residual_norm_backward(
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
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, branch, gamma, weight, bias, branch_bias), those of parameters in fp32; empty if not needed.

    Without grad_normed the sum alone was made, whose gradient is that of x.
    """
    if grad_normed is None:
        assert grad_total is not None
        total = grad_total = grad_total.contiguous()  # tells the shape
    assert total is not None
    _, need_branch, need_gamma, need_weight, need_bias, need_branch_bias = needs
    B, N, D = total.shape
    R, norm, need_norm = B * N, grad_normed is not None, need_weight or need_bias
    grad_x = torch.empty_like(total) if norm else total.new_empty(0)
    grad_branch = total.new_empty(total.shape if need_branch else 0, dtype=branch_dtype)
    block = triton.next_power_of_2(D)
    config = dict(launch_config("residual_norm_backward", total.device, block))
    programs = max(1, min(config.pop("PROGRAMS"), R))
    sums = need_norm or need_gamma or need_branch_bias
    partial = total.new_empty((4, programs, D) if sums else 0, dtype=torch.float32)
    make = total.new_zeros if R == 0 else total.new_empty  # the finishing kernel writes them
    grad_gamma, grad_weight, grad_bias, grad_branch_bias = (
        make(D if need else 0, dtype=torch.float32) for need in (need_gamma, need_norm, need_norm, need_branch_bias)
    )
    flags = {
        "HAS_GAMMA": gamma is not None, "HAS_BRANCH_BIAS": branch_bias is not None, "NEED_GAMMA": need_gamma,
        "NEED_NORM": need_norm, "NEED_BRANCH_BIAS": need_branch_bias,
    }  # fmt: skip
    gamma, branch_bias = _or(gamma, total), _or(branch_bias, total)
    if R > 0:
        launch(
            residual_norm_backward_kernel, (programs,),
            _or(grad_total, total), _or(grad_normed, total), total, _or(mean, total), _or(rstd, total),
            _or(weight, total), _or(branch, total), gamma, _or(drop_path, total),
            grad_x, grad_branch, partial, R, N, D, programs * D,
            HAS_GRAD_TOTAL=grad_total is not None, HAS_DROP=drop_path is not None, NORM=norm, NEED_BRANCH=need_branch,
            BLOCK=block, **flags, **config,
        )  # fmt: skip
        if sums:
            config = dict(launch_config("residual_norm_finish", total.device))
            launch(
                residual_norm_finish_kernel, (triton.cdiv(D, config["COLS"]), 4),
                partial, gamma, branch_bias, grad_weight, grad_bias, grad_gamma, grad_branch_bias,
                programs, D, programs * D, **flags, **config,
            )  # fmt: skip
    return [
        grad_x,
        grad_branch,
        grad_gamma,
        grad_weight if need_weight else grad_weight.new_empty(0),
        grad_bias if need_bias else grad_bias.new_empty(0),
        grad_branch_bias,
    ]


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer argument that the kernel never reads where the tensor is missing."""
    return stand_in if tensor is None else tensor.contiguous()
