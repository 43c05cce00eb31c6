"""Attention with a learned bias: beit_fast beside what PyTorch and others offer.

    pytest benchmarks/bench_attention.py --benchmark-only

All start from the packed output of one projection, (B, N, 3, H, K), and give (B, N, H, K); outputs and gradients are
compared before anything is timed. `SDPA` gets the bias as its mask, written out for every head, as timm does; `eager`
is the softmax by hand, as in the official code. cuDNN's graph API with a gradient of the bias and cuEquivariance's
triangle attention, whose bias has this shape, take part where they are installed. As a CUDA graph a call is its
kernels alone.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit_fast import kernels
from beit_fast.kernels.attention import backends
from beit_fast.kernels.backend import xformers_obstacle
from benchmarks.baselines.other_attention import cudnn_graph, triangle_attention
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable, captured

KERNEL = "beit_fast, its own kernel"
NAMES = [OURS, KERNEL, "SDPA", "SDPA, cuDNN", "eager", "xformers", "FlexAttention", "cuDNN graph", "cuEquivariance",
         "beit_fast, CUDA graph", "SDPA, CUDA graph"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """bias: "learned", "frozen" or "none"; `backward` with the gradients of qkv and, if learned, of the bias."""

    bias: str
    backward: bool
    window: int
    batch_size: int
    dtype: str
    device: torch.device
    compiled: bool
    """Whether FlexAttention takes part: compiling it needs minutes on a CPU."""
    num_heads: int = 12
    head_dim: int = 64


def cases(scale: Any) -> dict[str, Case]:
    full = ((14, 8), (14, 64), (14, 256), (24, 64), (32, 16), (40, 8))
    sizes = scale.pick(
        tiny=((2, 2),), cpu=((14, 8),), gpu=((14, 256), (24, 32)),
        full=full if scale.device.type == "cuda" else ((14, 8), (14, 32), (24, 2)),
    )  # fmt: skip
    compiled = scale.device.type == "cuda" or scale.name != "default"
    kinds = [("learned", True), ("learned", False), ("frozen", True), ("none", True), ("none", False)]
    return {
        f"{bias}-{window**2 + 1}-{batch}-{'training' if backward else 'inference'}": Case(
            bias, backward, window, batch, scale.dtype, scale.device, compiled
        )
        for window, batch in sizes
        for bias, backward in kinds
    }


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, N, H, K) each, bias (H, N, N) -> (B, N, H, K)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    wide = torch.promote_types(v.dtype, torch.float32)
    return (F.softmax(scores, dim=-1, dtype=wide).to(v.dtype) @ v).transpose(1, 2)


def compare(case: Case) -> Comparison:
    B, N, H, K = case.batch_size, case.window**2 + 1, case.num_heads, case.head_dim
    dtype, device, on_gpu = getattr(torch, case.dtype), case.device, case.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, N, 3, H, K, generator=generator).to(device, dtype).requires_grad_(case.backward)
    grad = torch.randn(B, N, H, K, generator=generator).to(device, dtype)
    bias = None
    if case.bias != "none":
        bias = torch.randn(H, N, N, generator=generator).to(device)
        bias.requires_grad_(case.backward and case.bias == "learned")

    def results(attend: Callable[[Tensor, Tensor | None], Tensor], wide: bool = False) -> dict[str, Tensor]:
        inputs = {"qkv": qkv, "bias": bias}
        if wide:
            inputs = {n: None if x is None else x.detach().double().requires_grad_(x.requires_grad)
                      for n, x in inputs.items()}  # fmt: skip
        leaves = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
        with torch.set_grad_enabled(case.backward):
            out = attend(inputs["qkv"], inputs["bias"])  # type: ignore[arg-type]
        found = {"output": out.detach()}
        if case.backward:
            gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
            found |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return found

    def from_parts(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
        return lambda x, b: function(*x.unbind(2), b, K**-0.5)

    def implementation(attend: Any, within: Any = contextlib.nullcontext, try_first: bool = False) -> Implementation:
        def run() -> dict[str, Tensor]:
            with within():
                return results(attend)

        if try_first:
            try:
                run()
            except Exception as error:
                raise Unavailable(
                    f"does not take this: {(str(error) or type(error).__name__).splitlines()[0]}"
                ) from None
        return Implementation(run, run)

    def own_kernel() -> Implementation:
        if not on_gpu:
            raise Unavailable("our kernel needs a GPU; on a CPU the row of beit_fast is torch's operations")
        if case.bias != "none":
            raise Unavailable("is what beit_fast runs where there is a bias")
        return implementation(kernels.packed_attention, lambda: kernels.use_backend("triton"))

    def only_on_gpu(attend: Any, within: Any = contextlib.nullcontext) -> Implementation:
        if not on_gpu:
            raise Unavailable("needs a GPU")
        return implementation(attend, within, try_first=True)

    def xformers() -> Implementation:
        if reason := xformers_obstacle():
            raise Unavailable(reason)
        return only_on_gpu(from_parts(backends.xformers))

    def flex() -> Implementation:
        if not on_gpu and case.backward:
            raise Unavailable("FlexAttention has no gradient on a CPU")
        if not case.compiled:
            raise Unavailable("compiling takes minutes on a CPU: --full")
        return implementation(from_parts(backends.flex))

    def graph(attend: Any) -> Implementation:
        replay = captured(lambda: results(attend))
        return Implementation(replay, replay)

    by_hand = from_parts(eager)
    builders: tuple[Callable[[], Implementation], ...] = (
        lambda: implementation(kernels.packed_attention),
        own_kernel,
        lambda: implementation(from_parts(backends.sdpa)),
        lambda: only_on_gpu(from_parts(backends.sdpa), lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
        lambda: implementation(by_hand),
        xformers,
        flex,
        lambda: only_on_gpu(from_parts(cudnn_graph())),
        lambda: only_on_gpu(from_parts(triangle_attention())),
        lambda: graph(kernels.packed_attention),
        lambda: graph(from_parts(backends.sdpa)),
    )
    what = {"learned": "a learned bias", "frozen": "a frozen bias", "none": "no bias"}[case.bias]
    values = 4 * B * N * H * K * (2 if case.backward else 1)
    return Comparison(
        group=f"attention with {what}, {'forward and backward' if case.backward else 'forward'}: "
        f"B={B}, N={N}, H={H}, K={K}, {case.dtype}",
        implementations=dict(zip(NAMES, builders, strict=True)),
        shapes={"B": B, "N": N, "H": H, "K": K, "bias": case.bias}, dtype=case.dtype,
        flops=(14.0 if case.backward else 4.0) * B * H * N * N * K,
        bytes=values * grad.element_size() + (0 if bias is None else 4.0 * bias.numel() * (1 + case.backward)),
        exact=None if case.dtype == "float32" else lambda: (results(by_hand, wide=True), results(by_hand)),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_attention(interleaved, case, name):
    interleaved(case, functools.partial(compare, case), name)
