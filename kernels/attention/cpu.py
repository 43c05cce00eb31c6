"""Attention on CPU: one sample at a time, so that its (H, N, N) scores are born, normalised and used within the cache.

The strided (N, H, K) views of one sample go straight into the batched matrix product: nothing is copied or transposed.
Inference is torch's own fused kernel. Training keeps the probabilities, which is faster than making them again, up to
KEEP_BYTES for one call; beyond that it keeps log-sum-exp of the scores and makes them again sample by sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_BYTES = 128 * 2**20
_SCRATCH_BYTES = 64 * 2**20  # a slice of heads at a time where one sample's scores take more


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def keeps_probabilities(q: Tensor) -> bool:
    batch, num_tokens, num_heads, _ = q.shape
    return batch * num_heads * num_tokens * num_tokens * compute_dtype(q.dtype).itemsize <= KEEP_BYTES


def saved_shape(q: Tensor) -> tuple[int, ...]:
    """What `forward_train` keeps: probabilities (B, H, N, N), or log-sum-exp (B, H, N) where these are too many."""
    batch, num_tokens, num_heads, _ = q.shape
    rows = (batch, num_heads, num_tokens)
    return (*rows, num_tokens) if keeps_probabilities(q) else rows


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, N, H, K) three times -> (B, N, H, K), nothing kept."""
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous()  # no copy: the fused kernel writes (B, N, H, K)


def forward_train(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, N, H, K), and what `backward` wants kept."""
    if not keeps_probabilities(q):
        return _forward_lse(q, k, v, bias, scale)
    compute = compute_dtype(q.dtype)
    out = q.new_empty(q.shape)
    kept = q.new_empty(saved_shape(q), dtype=compute)
    added = None if bias is None else bias.to(compute)
    for b in range(q.shape[0]):
        queries, keys, values = (x[b].transpose(0, 1).to(compute) for x in (q, k, v))  # (H, N, K)
        scores = kept[b]
        torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if added is not None:
            scores.add_(added)
        torch.softmax(scores, dim=-1, out=scores)
        if compute == q.dtype:
            torch.bmm(scores, values, out=out[b].transpose(0, 1))
        else:
            out[b].copy_(torch.bmm(scores, values).transpose(0, 1))
    return out, kept


def _forward_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(q.dtype)
    mask = None if bias is None else bias.to(compute).unsqueeze(0)
    heads_first = (x.transpose(1, 2).to(compute) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous()


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """The packed gradient (B, N, 3, H, K) of q, k, v, and that of the bias (H, N, N) summed over the batch in order."""
    batch, num_tokens, num_heads, head_dim = q.shape
    compute = compute_dtype(q.dtype)
    grad_qkv = q.new_empty(batch, num_tokens, 3, num_heads, head_dim)
    grad_bias = q.new_zeros(num_heads, num_tokens, num_tokens, dtype=compute) if need_bias else None
    added = None if bias is None else bias.to(compute)
    per_head = num_tokens * num_tokens * compute.itemsize
    step = max(1, min(num_heads, _SCRATCH_BYTES // per_head))
    scratch = q.new_empty(2, step, num_tokens, num_tokens, dtype=compute)
    for b in range(batch):
        for start in range(0, num_heads, step):
            heads = slice(start, min(start + step, num_heads))
            queries, keys, values, grad = (x[b, :, heads].transpose(0, 1).to(compute) for x in (q, k, v, grad_out))
            grad_scores, weights = scratch[:, : heads.stop - heads.start].unbind(0)
            if saved.dim() == 4:
                weights = saved[b, heads]
            else:
                torch.baddbmm(weights, queries, keys.transpose(1, 2), beta=0, alpha=scale, out=weights)
                if added is not None:
                    weights.add_(added[heads])
                weights.sub_(saved[b, heads].unsqueeze(-1)).exp_()
            targets = [grad_qkv[b, :, part, heads].transpose(0, 1) for part in range(3)]
            into = targets if compute == q.dtype else [torch.empty_like(queries) for _ in range(3)]
            torch.bmm(weights.transpose(1, 2), grad, out=into[2])
            torch.bmm(grad, values.transpose(1, 2), out=grad_scores)
            # row by row: weights * (grad_scores - sum(weights * grad_scores)), in place
            torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, compute, grad_input=grad_scores)
            if grad_bias is not None:
                grad_bias[heads].add_(grad_scores)
            torch.baddbmm(into[0], grad_scores, keys, beta=0, alpha=scale, out=into[0])
            torch.baddbmm(into[1], grad_scores.transpose(1, 2), queries, beta=0, alpha=scale, out=into[1])
            if into is not targets:
                for target, gradient in zip(targets, into, strict=True):
                    target.copy_(gradient)
    return grad_qkv, grad_bias
