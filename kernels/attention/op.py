"""The operations `packed_attention`, `biased_attention` and `prepare_bias`: schema, dispatch and gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from . import cpu, reference


class PreparedBias(NamedTuple):
    """A bias ready for the kernels: `bias` (H, N, N) takes the gradient, `padded` is what the kernels read."""

    bias: Tensor
    padded: Tensor


Bias = Tensor | PreparedBias | None


def prepare_bias(bias: Tensor, dtype: torch.dtype) -> Tensor | PreparedBias:
    """Pads and scales a bias once for all the blocks (and both directions) that share it.

    Args:
        bias: (H, N, N), floating.
        dtype: that of the queries, keys and values it will meet.

    Returns:
        An object to hand to `packed_attention` or `biased_attention` in place of the bias; the gradient flows through
        it to `bias`. Where our kernels do not run (on CPU, say) it is the bias itself.
    """
    if not _kernels_read(bias, dtype):
        return bias
    return PreparedBias(bias, torch.ops.beit_fast.prepare_bias(bias.detach(), dtype, _needs_gradient(bias)))


def packed_attention(qkv: Tensor, bias: Bias = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v on the packed output of one projection.

    Args:
        qkv: (B, N, 3, H, K), floating; contiguous is fastest.
        bias: (H, N, N) added to the scores, or what `prepare_bias` returned, or None.
        scale: of q k^T; K ** -0.5 if None.

    Returns:
        (B, N, H, K) in the dtype of qkv. Gradients of qkv and of the bias are deterministic; that of a bias without
        `requires_grad` is not computed.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating (B, N, 3, H, K), got {qkv.dtype} {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(2)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensor, padded = _check_bias(q, bias)
    if backend.chosen_backend() == "reference":
        return reference.biased_attention(q, k, v, tensor, scale)
    if _needs_gradient(qkv, tensor):
        return torch.ops.beit_fast.packed_attention(qkv, tensor, padded, scale)[0]
    return torch.ops.beit_fast.attention(q, k, v, tensor, padded, scale)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Bias = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v on three (B, N, H, K) tensors or strided views of one dtype.

    Bias, scale, result and gradients as in `packed_attention`.
    """
    if q.dim() != 4 or not q.is_floating_point() or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "q, k, v must be floating (B, N, H, K) of one shape, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k, v must have one dtype and one device, got {kinds}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensor, padded = _check_bias(q, bias)
    if backend.chosen_backend() == "reference":
        return reference.biased_attention(q, k, v, tensor, scale)
    if _needs_gradient(q, k, v, tensor):
        return torch.ops.beit_fast.biased_attention(q, k, v, tensor, padded, scale)[0]
    return torch.ops.beit_fast.attention(q, k, v, tensor, padded, scale)


def _check_bias(q: Tensor, bias: Bias) -> tuple[Tensor | None, Tensor | None]:
    tensor, padded = (bias.bias, bias.padded) if isinstance(bias, PreparedBias) else (bias, None)
    if tensor is None:
        return None, None
    _, num_tokens, num_heads, _ = q.shape
    if tuple(tensor.shape) != (num_heads, num_tokens, num_tokens) or not tensor.is_floating_point():
        raise ValueError(
            f"bias must be floating (H, N, N) = ({num_heads}, {num_tokens}, {num_tokens}), "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.device != q.device:
        raise ValueError(f"bias is on {tensor.device} but the queries are on {q.device}")
    return tensor, padded


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kernels_read(tensor: Tensor, dtype: torch.dtype) -> bool:
    return False


@torch.library.custom_op("beit_fast::prepare_bias", mutates_args=())
def _prepare(bias: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    from . import kernel

    return kernel.prepare_bias(bias, dtype, transposed)


@torch.library.custom_op("beit_fast::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    scale: float,
) -> Tensor:
    return cpu.forward(q, k, v, bias, scale, keep=False)[0]


@_attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, kept = cpu.forward(q, k, v, bias, scale, keep=True)
    assert kept is not None
    return out, kept


def _forward_fake(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(cpu.saved_shape(q), dtype=cpu.compute_dtype(q.dtype))


@torch.library.custom_op("beit_fast::packed_attention", mutates_args=())
def _packed(qkv: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, bias, padded, scale)


@_packed.register_fake
def _packed_fake(qkv: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _forward_fake(qkv.select(2, 0))


@torch.library.custom_op("beit_fast::biased_attention", mutates_args=())
def _biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, bias, padded, scale)


@_biased.register_fake
def _biased_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _forward_fake(q)


@torch.library.custom_op("beit_fast::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    out: Tensor,
    saved: Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    grad_qkv, grad_bias = cpu.backward(grad_out, q, k, v, out, saved, scale, need_bias)
    return grad_qkv, saved.new_empty(0) if grad_bias is None else grad_bias


@_attention_backward.register_fake
def _attention_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    out: Tensor,
    saved: Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, num_heads, head_dim = q.shape
    grad_bias = saved.new_empty((num_heads, num_tokens, num_tokens) if need_bias else (0,))
    return q.new_empty(batch, num_tokens, 3, num_heads, head_dim), grad_bias


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _biased_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _packed_backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    qkv, bias, padded, out, saved = ctx.saved_tensors
    need_bias = ctx.needs_input_grad[1]
    grad_qkv, grad_bias = torch.ops.beit_fast.attention_backward(
        grad_out, *qkv.unbind(2), bias, padded, out, saved, ctx.scale, need_bias
    )
    return grad_qkv, grad_bias.to(bias.dtype) if need_bias else None, None, None


def _biased_backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, bias, padded, out, saved = ctx.saved_tensors
    need_bias = ctx.needs_input_grad[3]
    grad_qkv, grad_bias = torch.ops.beit_fast.attention_backward(
        grad_out, q, k, v, bias, padded, out, saved, ctx.scale, need_bias
    )
    return *grad_qkv.unbind(2), grad_bias.to(bias.dtype) if need_bias else None, None, None


_packed.register_autograd(_packed_backward, setup_context=_packed_context)
_biased.register_autograd(_biased_backward, setup_context=_biased_context)
