"""The operations `packed_attention`, `biased_attention` and `prepare_bias`: schema, dispatch and gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_fast.kernels import backend
from beit_fast.kernels.attention import backends, cpu, reference
from beit_fast.kernels.registration import differentiable_op, plain_op


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

    Raises:
        ValueError: the bias is not floating (H, N, N).
    """
    if bias.dim() != 3 or bias.shape[1] != bias.shape[2] or not bias.is_floating_point():
        raise ValueError(f"bias must be floating (H, N, N), got {bias.dtype} {tuple(bias.shape)}")
    if backends.choose(bias.device, dtype, 0, with_bias=True).name != "triton":
        return bias
    return PreparedBias(bias, _prepare(bias.detach(), dtype, torch.is_grad_enabled()))


def packed_attention(qkv: Tensor, bias: Bias = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v on the packed output of one projection.

    Args:
        qkv: (B, N, 3, H, K), floating; contiguous is fastest.
        bias: (H, N, N) added to the scores, or what `prepare_bias` returned, or None.
        scale: of q k^T; K ** -0.5 if None.

    Returns:
        (B, N, H, K) in the dtype of qkv. Our own gradients of qkv and of the bias are deterministic; that of a bias
        without `requires_grad` is not computed.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Examples:
        >>> import torch
        >>> from beit_fast.kernels import packed_attention
        >>> packed_attention(torch.zeros(2, 197, 3, 12, 64), torch.zeros(12, 197, 197)).shape
        torch.Size([2, 197, 12, 64])
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating (B, N, 3, H, K), got {qkv.dtype} {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(2)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensor, padded, run = _check_bias(q, bias)
    if run is not None:
        return run(q, k, v, tensor, scale)
    if _needs_gradient(qkv, tensor):
        return _packed(qkv, tensor, padded, scale, _needs_gradient(tensor))[0]
    return _attention(q, k, v, tensor, padded, scale)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Bias = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v on three (B, N, H, K) tensors or strided views of one dtype.

    Args:
        q: (B, N, H, K), floating.
        k: as q.
        v: as q.
        bias: (H, N, N) added to the scores, or what `prepare_bias` returned, or None.
        scale: of q k^T; K ** -0.5 if None.

    Returns:
        (B, N, H, K) in the dtype of q, with the gradients of `packed_attention`.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Examples:
        >>> import torch
        >>> from beit_fast.kernels import biased_attention
        >>> q, k, v = torch.zeros(3, 2, 197, 12, 64)
        >>> biased_attention(q, k, v, torch.zeros(12, 197, 197)).shape
        torch.Size([2, 197, 12, 64])
    """
    if q.dim() != 4 or not q.is_floating_point() or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "q, k, v must be floating (B, N, H, K) of one shape, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k, v must have one dtype and one device, got {kinds}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensor, padded, run = _check_bias(q, bias)
    if run is not None:
        return run(q, k, v, tensor, scale)
    if _needs_gradient(q, k, v, tensor):
        return _biased(q, k, v, tensor, padded, scale, _needs_gradient(tensor))[0]
    return _attention(q, k, v, tensor, padded, scale)


def _check_bias(q: Tensor, bias: Bias) -> tuple[Tensor | None, Tensor | None, Any]:
    """The bias, its prepared form if our kernels run, and the function to call instead of our ops, if any."""
    tensor, padded = (bias.bias, bias.padded) if isinstance(bias, PreparedBias) else (bias, None)
    _, num_tokens, num_heads, head_dim = q.shape
    if tensor is not None:
        if tuple(tensor.shape) != (num_heads, num_tokens, num_tokens) or not tensor.is_floating_point():
            raise ValueError(
                f"bias must be floating (H, N, N) = ({num_heads}, {num_tokens}, {num_tokens}), "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"bias is on {tensor.device} but the queries are on {q.device}")
    name = backends.choose(q.device, q.dtype, head_dim, tensor is not None).name
    if name == "reference":
        return tensor, None, reference.biased_attention
    if name in backends.OTHERS:
        return tensor, None, backends.OTHERS[name]
    if name == "triton" and tensor is not None and padded is None:
        padded = _prepare(tensor.detach(), q.dtype, torch.is_grad_enabled())
    return tensor, padded, None


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _runs_kernels(tensor: Tensor) -> bool:
    """Within an op: whether the kernels or the CPU implementation serve it. The choice itself is made outside."""
    return tensor.device.type != "cpu" or (backend.interpreting() and backend.chosen_backend() == "triton")


def _prepare_impl(bias: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    from beit_fast.kernels.attention import kernel

    return kernel.prepare_bias(bias, dtype, transposed)


def _prepare_fake(bias: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    from beit_fast.kernels.attention import kernel

    num_heads, num_tokens, _ = bias.shape
    shape = (2 if transposed else 1, num_heads, num_tokens, kernel.padded_width(num_tokens))
    return bias.new_empty(shape, dtype=kernel.prepared_dtype(dtype))


def _attention_impl(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float
) -> Tensor:
    """Inference: nothing is saved."""
    if _runs_kernels(q):
        from beit_fast.kernels.attention import kernel

        return kernel.forward(q, k, v, padded, scale, save=False)[0]
    return cpu.forward(q, k, v, bias, scale)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float
) -> Tensor:
    return q.new_empty(q.shape)


def _biased_impl(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float, learned: bool
) -> tuple[Tensor, Tensor]:
    """The output, and what the backward wants saved: log-sum-exp (B, H, N), on CPU the probabilities of a bias that is
    `learned`."""
    if _runs_kernels(q):
        from beit_fast.kernels.attention import kernel

        out, lse = kernel.forward(q, k, v, padded, scale, save=True)
        assert lse is not None
        return out, lse
    return cpu.forward_train(q, k, v, bias, scale, learned)


def _biased_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float, learned: bool
) -> tuple[Tensor, Tensor]:
    if _runs_kernels(q):
        batch, num_tokens, num_heads, _ = q.shape
        saved = q.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    else:
        saved = q.new_empty(cpu.saved_shape(q, learned), dtype=cpu.compute_dtype(q.dtype))
    return q.new_empty(q.shape), saved


def _packed_impl(
    qkv: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float, learned: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _biased_impl(q, k, v, bias, padded, scale, learned)


def _packed_fake(
    qkv: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float, learned: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _biased_fake(q, k, v, bias, padded, scale, learned)


def _backward_impl(
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
    """The packed gradient (B, N, 3, H, K), and that of the bias: (H, N, N) in at least fp32, or empty."""
    if _runs_kernels(q):
        from beit_fast.kernels.attention import kernel

        if bias is not None and (padded is None or padded.shape[0] < 2):  # prepared where no gradient was in sight
            padded = kernel.prepare_bias(bias, q.dtype, transposed=True)
        grad_qkv, grad_bias = kernel.backward(grad_out, q, k, v, padded, out, saved, scale, need_bias)
    else:
        grad_qkv, grad_bias = cpu.backward(grad_out, q, k, v, bias, out, saved, scale, need_bias)
    return grad_qkv, saved.new_empty(0) if grad_bias is None else grad_bias


def _backward_fake(
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _packed_autograd(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    qkv, bias, padded, out, saved = ctx.saved_tensors
    need_bias = ctx.needs_input_grad[1]
    q, k, v = qkv.unbind(2)
    grad_qkv, grad_bias = _backward(grad_out, q, k, v, bias, padded, out, saved, ctx.scale, need_bias)
    return grad_qkv, grad_bias.to(bias.dtype) if need_bias else None, None, None, None


def _biased_autograd(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, bias, padded, out, saved = ctx.saved_tensors
    need_bias = ctx.needs_input_grad[3]
    grad_qkv, grad_bias = _backward(grad_out, q, k, v, bias, padded, out, saved, ctx.scale, need_bias)
    return *grad_qkv.unbind(2), grad_bias.to(bias.dtype) if need_bias else None, None, None, None


_prepare = plain_op("prepare_bias", _prepare_impl, _prepare_fake)
_attention = plain_op("attention", _attention_impl, _attention_fake)
_backward = plain_op("attention_backward", _backward_impl, _backward_fake)
_packed = differentiable_op("packed_attention", _packed_impl, _packed_fake, _setup, _packed_autograd)
_biased = differentiable_op("biased_attention", _biased_impl, _biased_fake, _setup, _biased_autograd)
