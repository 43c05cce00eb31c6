"""The definition of attention with an additive bias (BEiT, arXiv 2106.08254, section 2.1; softmax in at least fp32)."""

from __future__ import annotations

import torch


def biased_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(scale * q k^T + bias) v for (B, N, H, K) inputs and a bias (H, N, N); returns (B, N, H, K)."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhk,bnhk->bhqn", q.to(compute) * scale, k.to(compute))
    if bias is not None:
        scores = scores + bias.to(compute)
    return torch.einsum("bhqn,bnhk->bqhk", scores.softmax(dim=-1), v.to(compute)).to(q.dtype)
