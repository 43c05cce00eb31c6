"""Attention on CPU: as many samples at a time as keep their (H, N, N) scores, from birth to use, within the cache.

Their (N, H, K) views are copied heads first: a BLAS may take half as long again over strided operands, and the copy
costs a twentieth of one product. With a learned bias training keeps the probabilities, which is faster than making them
again, up to KEEP_BYTES for one call; beyond that it keeps log-sum-exp of the scores and makes them again, some heads at
a time. Inference, and training where no bias is learned, are torch's own fused kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.backend import compiled_module, compiled_serves

KEEP_BYTES = 128 * 2**20
_CACHED_BYTES = 2 * 2**20  # one sample of BEiT-B at 224 px, four of BEiT-Ti
_GROUP = 8  # samples
_SCRATCH_BYTES = 8 * 2**20  # a slice of heads at a time where one sample's scores take more


def keeps_probabilities(q: Tensor, learned: bool) -> bool:
    """Only a bias with a gradient wants more than torch's fused backward pass gives."""
    batch, num_tokens, num_heads, _ = q.shape
    scores = batch * num_heads * num_tokens * num_tokens
    return learned and scores * torch.promote_types(q.dtype, torch.float32).itemsize <= KEEP_BYTES


def saved_shape(q: Tensor, learned: bool) -> tuple[int, ...]:
    """What `forward_train` keeps: probabilities (B, H, N, N), or log-sum-exp (B, H, N)."""
    batch, num_tokens, num_heads, _ = q.shape
    rows = (batch, num_heads, num_tokens)
    return (*rows, num_tokens) if keeps_probabilities(q, learned) else rows


def _samples_at_once(q: Tensor) -> int:
    batch, num_tokens, num_heads, _ = q.shape
    one = num_heads * num_tokens * num_tokens * torch.promote_types(q.dtype, torch.float32).itemsize
    return max(1, min(batch, _CACHED_BYTES // one))


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(B, N, H, K) three times -> the output (B, N, H, K), and nothing kept."""
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
    nothing = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    return out.transpose(1, 2).contiguous(), nothing  # no copy: the fused kernel writes (B, N, H, K)


def forward_train(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, learned: bool
) -> tuple[Tensor, Tensor]:
    """The output (B, N, H, K), and what `backward` wants kept."""
    if not keeps_probabilities(q, learned):
        return _forward_lse(q, k, v, bias, scale)
    batch, num_tokens, num_heads, head_dim = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape)
    kept = q.new_empty(saved_shape(q, learned), dtype=compute)
    samples = _samples_at_once(q)
    operands = q.new_empty(4, samples, num_heads, num_tokens, head_dim, dtype=compute)
    added = None if bias is None else bias.to(compute).contiguous()
    in_one_pass, threads = compiled_serves(kept, added), torch.get_num_threads()
    for first in range(0, batch, samples):
        some = slice(first, min(first + samples, batch))
        chunk = operands[:, : some.stop - first]
        for target, source in zip(chunk, (q, k, v), strict=False):
            target.copy_(source[some].transpose(1, 2))
        queries, keys, values, product = chunk.flatten(1, 2).unbind(0)
        scores = kept[some].flatten(0, 1)
        torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if in_one_pass:
            compiled_module().biased_softmax(kept[some], added, threads)
        else:
            if added is not None:
                kept[some].add_(added)
            torch.softmax(scores, dim=-1, out=scores)
        torch.bmm(scores, values, out=product)
        out[some].copy_(chunk[3].transpose(1, 2))
    return out, kept


def _forward_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
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
    out: Tensor,
    saved: Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The packed gradient (B, N, 3, H, K) of q, k, v, and that of the bias (H, N, N) in order (or empty)."""
    if saved.dim() == 3 and not need_bias:
        return _backward_fused(grad_out, q, k, v, bias, out, saved, scale), saved.new_empty(0)
    batch, num_tokens, num_heads, head_dim = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    grad_qkv = q.new_empty(batch, num_tokens, 3, num_heads, head_dim)
    in_one_pass, threads = compiled_serves(saved), torch.get_num_threads()
    new = q.new_empty if in_one_pass else q.new_zeros  # the compiled kernel starts the sums itself
    grad_bias = new((num_heads, num_tokens, num_tokens) if need_bias else 0, dtype=compute)
    group = new(
        grad_bias.shape, dtype=compute
    )  # the sum of some samples, so that rounding does not grow with the batch
    added = None if bias is None else bias.to(compute)
    samples = _samples_at_once(q)
    step = max(1, min(num_heads, _SCRATCH_BYTES // (num_tokens * num_tokens * compute.itemsize)))
    operands = q.new_empty(5, samples * step, num_tokens, head_dim, dtype=compute)
    scratch = q.new_empty(2, samples * step, num_tokens, num_tokens, dtype=compute)
    for first in range(0, batch, samples):
        some = slice(first, min(first + samples, batch))
        for start in range(0, num_heads, step):  # one pass, unless there is one sample at a time
            heads = slice(start, min(start + step, num_heads))
            shape = (some.stop - first, heads.stop - start)
            count = shape[0] * shape[1]
            queries, keys, values, grad, product = operands[:, :count].unbind(0)
            for target, source in ((queries, q), (keys, k), (values, v), (grad, grad_out)):
                target.unflatten(0, shape).copy_(source[some, :, heads].transpose(1, 2))
            grad_scores, weights = scratch[:, :count].unbind(0)
            if saved.dim() == 4:
                weights = saved[some, heads].flatten(0, 1)
            else:
                torch.baddbmm(weights, queries, keys.transpose(1, 2), beta=0, alpha=scale, out=weights)
                if added is not None:
                    weights.unflatten(0, shape).add_(added[heads])
                weights.sub_(saved[some, heads].flatten(0, 1).unsqueeze(-1)).exp_()
            result = product.unflatten(0, shape)
            into_q, into_k, into_v = grad_qkv[some, :, :, heads].transpose(1, 3).unbind(2)
            torch.bmm(weights.transpose(1, 2), grad, out=product)
            into_v.copy_(result)
            torch.bmm(grad, values.transpose(1, 2), out=grad_scores)
            # row by row: weights * (grad_scores - sum(weights * grad_scores)), in place
            if in_one_pass:
                in_place = (grad_scores.unflatten(0, shape), weights.unflatten(0, shape))
                sums = (grad_bias[heads], group[heads]) if need_bias else (None, None)
                compiled_module().softmax_backward(*in_place, *sums, first, batch, _GROUP, threads)
            else:
                torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, compute, grad_input=grad_scores)
                of_samples = grad_scores.unflatten(0, shape) if need_bias else ()
                for sample, of_sample in enumerate(of_samples, start=first + 1):  # in their order
                    group[heads].add_(of_sample)
                    if sample % _GROUP == 0 or sample == batch:
                        grad_bias[heads].add_(group[heads])
                        group[heads].zero_()
            torch.baddbmm(product, grad_scores, keys, beta=0, alpha=scale, out=product)
            into_q.copy_(result)
            torch.baddbmm(product, grad_scores.transpose(1, 2), queries, beta=0, alpha=scale, out=product)
            into_k.copy_(result)
    return grad_qkv, grad_bias


def _backward_fused(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """The packed gradient by torch's own kernel, which knows none of the bias."""
    compute = torch.promote_types(q.dtype, torch.float32)
    mask = None if bias is None else bias.to(compute).unsqueeze(0)
    heads_first = (x.transpose(1, 2).to(compute) for x in (grad_out, q, k, v, out))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, lse, 0.0, False, attn_mask=mask, scale=scale
    )
    return torch.stack([gradient.transpose(1, 2).to(q.dtype) for gradient in gradients], dim=2)
