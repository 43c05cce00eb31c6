"""The operations `packed_attention`, `biased_attention` and `prepare_bias`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_fast.kernels.attention import backends, cpu, reference
from beit_fast.kernels.backend import select
from beit_fast.kernels.registration import fused_op


class PreparedBias(NamedTuple):
    """A bias ready for the kernels: `bias` (H, N, N) takes the gradient, the others are what the kernels read."""

    bias: Tensor
    padded: Tensor
    transposed: Tensor


Bias = Tensor | PreparedBias | None


def prepare_bias(bias: Tensor, dtype: torch.dtype) -> Tensor | PreparedBias:
    """Pads and scales a bias once for all the blocks (and both directions) that share it.

    Args:
        bias: (H, N, N), floating.
        dtype: that of the queries, keys and values it will meet.

    Returns:
        What `packed_attention` and `biased_attention` take in place of the bias; the gradient flows through it to
        `bias`. Where our kernels do not run (on CPU, say) it is the bias itself.

    Raises:
        ValueError: the bias is not floating (H, N, N).
    """
    if bias.dim() != 3 or bias.shape[1] != bias.shape[2] or not bias.is_floating_point():
        raise ValueError(f"bias must be floating (H, N, N), got {bias.dtype} {tuple(bias.shape)}")
    if select("biased_attention", bias, dtype) != "triton":
        return bias
    return PreparedBias(bias, *_prepare_bias(bias.detach(), dtype, torch.is_grad_enabled()))


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
    return _run(qkv, None, None, bias, scale)


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
    return _run(q, k, v, bias, scale)


def _run(q: Tensor, k: Tensor | None, v: Tensor | None, given: Bias, scale: float | None) -> Tensor:
    """The attention of the backend in force; without k and v, q is the packed (B, N, 3, H, K)."""
    bias, padded, transposed = given if isinstance(given, PreparedBias) else (given, None, None)
    num_tokens, num_heads, head_dim = q.shape[1], q.shape[-2], q.shape[-1]
    if bias is not None:
        if tuple(bias.shape) != (num_heads, num_tokens, num_tokens) or not bias.is_floating_point():
            raise ValueError(
                f"bias must be floating (H, N, N) = ({num_heads}, {num_tokens}, {num_tokens}), "
                f"got {bias.dtype} {tuple(bias.shape)}"
            )
        if bias.device != q.device:
            raise ValueError(f"bias is on {bias.device} but the queries are on {q.device}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    backend = select("attention" if bias is None else "biased_attention", q, head_dim=head_dim)
    if backend not in ("cpu", "triton"):
        attend = reference.biased_attention if backend == "reference" else backends.OTHERS[backend]
        q, k, v = q.unbind(2) if k is None or v is None else (q, k, v)
        return attend(q, k, v, bias, scale)
    learned = torch.is_grad_enabled() and bias is not None and bias.requires_grad
    saves = learned or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v)))
    if backend == "triton" and bias is not None and padded is None:
        padded, transposed = _prepare_bias(bias.detach(), q.dtype, saves)
    return _attention(q, k, v, bias, padded, transposed, scale, saves, learned, backend)[0]


def _prepare_fake(bias: Tensor, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    from beit_fast.kernels.attention.bias import one_pass_rows, padded_shape, prepared_dtype, transposed_shape

    num_heads, num_tokens, _ = bias.shape
    forward_row, backward_row = one_pass_rows(num_tokens, bias.device)
    shape = transposed_shape(num_heads, num_tokens, backward_row) if transposed else (0,)
    padded = bias.new_empty(padded_shape(num_heads, num_tokens, forward_row), dtype=prepared_dtype(dtype))
    return padded, padded.new_empty(shape)


@fused_op("beit_fast::prepare_bias", fake=_prepare_fake)
def _prepare_bias(bias: Tensor, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    from beit_fast.kernels.attention.bias import one_pass_rows, prepare_bias

    return prepare_bias(bias, dtype, transposed, *one_pass_rows(bias.shape[1], bias.device))


def _fake(q: Tensor, k: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    *_, saves, learned, backend = others
    q = q.unbind(2)[0] if k is None else q
    saved: tuple[int, ...] = (q.shape[0], q.shape[2], q.shape[1])
    if backend == "cpu":
        saved = cpu.saved_shape(q, learned)
    return q.new_empty(q.shape), q.new_empty(saved if saves else 0, dtype=torch.promote_types(q.dtype, torch.float32))


@fused_op("beit_fast::attention", fake=_fake)
def _attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    padded: Tensor | None,
    transposed: Tensor | None,
    scale: float,
    saves: bool,
    learned: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output (B, N, H, K), and what the gradient wants saved (empty unless `saves`).

    That is log-sum-exp (B, H, N), on a CPU the probabilities (B, H, N, N) beside a bias that is `learned`.
    """
    q, k, v = q.unbind(2) if k is None or v is None else (q, k, v)
    if backend == "triton":
        from beit_fast.kernels.attention.forward import attention_forward

        return attention_forward(q, k, v, bias, padded, scale, saves)
    if saves:
        return cpu.forward_train(q, k, v, bias, scale, learned)
    return cpu.forward(q, k, v, bias, scale)


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    *_, saved, _, need_bias, _ = others
    batch, num_tokens, num_heads, head_dim = grad_out.shape
    grad_bias = saved.new_empty((num_heads, num_tokens, num_tokens) if need_bias else 0)
    return q.new_empty(batch, num_tokens, 3, num_heads, head_dim), grad_bias


@fused_op("beit_fast::attention_backward", fake=_backward_fake)
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    padded: Tensor | None,
    transposed: Tensor | None,
    out: Tensor,
    saved: Tensor,
    scale: float,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The packed gradient (B, N, 3, H, K), and that of the bias: (H, N, N) in at least fp32, or empty."""
    q, k, v = q.unbind(2) if k is None or v is None else (q, k, v)
    if backend == "triton":
        from beit_fast.kernels.attention.backward import attention_backward

        return attention_backward(grad_out, q, k, v, bias, padded, transposed, out, saved, scale, need_bias)
    return cpu.backward(grad_out, q, k, v, bias, out, saved, scale, need_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what the gradient wants saved
    ctx.save_for_backward(*tensors, *output)


@_attention.backward(_save)
def _gradients(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 10
    q, k, v, bias, padded, transposed, out, saved = ctx.saved_tensors
    need_bias = ctx.needs_input_grad[3]
    given = (grad_out, q, k, v, bias, padded, transposed, out, saved, ctx.scale, need_bias, ctx.backend)
    grad_qkv, grad_bias = _attention_backward(*given)
    grad_q, grad_k, grad_v = (grad_qkv, None, None) if k is None else grad_qkv.unbind(2)
    return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype) if need_bias else None, *(None,) * 6
