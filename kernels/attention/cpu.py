"""Attention on CPU: one sample at a time, so that its (H, N, N) scores are born, normalised and used within the cache.

The strided (N, H, K) views of one sample go straight into the batched matrix product: nothing is copied or transposed.
"""

from __future__ import annotations

import torch


def saved_shape(q: torch.Tensor) -> tuple[int, ...]:
    """What the CPU forward keeps for the backward: the probabilities (B, H, N, N)."""
    batch, num_tokens, num_heads, _ = q.shape
    return (batch, num_heads, num_tokens, num_tokens)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, N, H, K) three times -> the output (B, N, H, K) and, if `keep`, the probabilities (B, H, N, N)."""
    batch, num_tokens, num_heads, head_dim = q.shape
    compute = compute_dtype(q.dtype)
    out = q.new_empty(batch, num_tokens, num_heads, head_dim)
    kept = torch.empty(saved_shape(q), dtype=compute) if keep else None
    scratch = None if keep else torch.empty(num_heads, num_tokens, num_tokens, dtype=compute)
    added = None if bias is None else bias.to(compute)
    for b in range(batch):
        queries, keys, values = (x[b].transpose(0, 1).to(compute) for x in (q, k, v))  # (H, N, K)
        scores = kept[b] if kept is not None else scratch
        assert scores is not None
        if added is None:
            torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=scale, out=scores)
        else:
            torch.baddbmm(added, queries, keys.transpose(1, 2), alpha=scale, out=scores)
        torch.softmax(scores, dim=-1, out=scores)
        if compute == q.dtype:
            torch.bmm(scores, values, out=out[b].transpose(0, 1))
        else:
            out[b].copy_(torch.bmm(scores, values).transpose(0, 1))
    return out, kept


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    probabilities: torch.Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The packed gradient (B, N, 3, H, K) of q, k, v, and that of the bias (H, N, N) summed over the batch in order."""
    batch, num_tokens, num_heads, head_dim = q.shape
    compute = compute_dtype(q.dtype)
    grad_qkv = q.new_empty(batch, num_tokens, 3, num_heads, head_dim)
    grad_bias = torch.zeros(num_heads, num_tokens, num_tokens, dtype=compute) if need_bias else None
    grad_scores = torch.empty(num_heads, num_tokens, num_tokens, dtype=compute)
    for b in range(batch):
        queries, keys, values, grad = (x[b].transpose(0, 1).to(compute) for x in (q, k, v, grad_out))  # (H, N, K)
        grad_q, grad_k, grad_v = (
            g.transpose(0, 1) if compute == q.dtype else torch.empty(queries.shape, dtype=compute)
            for g in grad_qkv[b].unbind(1)
        )
        weights = probabilities[b]
        row_sums = (grad_out[b].to(compute) * out[b].to(compute)).sum(-1).t().unsqueeze(-1)  # (H, N, 1)
        torch.bmm(weights.transpose(1, 2), grad, out=grad_v)
        torch.baddbmm(row_sums, grad, values.transpose(1, 2), beta=-1, out=grad_scores)
        grad_scores.mul_(weights)
        if grad_bias is not None:
            grad_bias.add_(grad_scores)
        torch.baddbmm(grad_q, grad_scores, keys, beta=0, alpha=scale, out=grad_q)
        torch.baddbmm(grad_k, grad_scores.transpose(1, 2), queries, beta=0, alpha=scale, out=grad_k)
        if compute != q.dtype:
            for index, gradient in enumerate((grad_q, grad_k, grad_v)):
                grad_qkv[b, :, index].copy_(gradient.transpose(0, 1))
    return grad_qkv, grad_bias
