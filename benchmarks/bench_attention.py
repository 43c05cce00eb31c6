"""Attention with a learned bias: beit_fast beside what PyTorch and others offer.

    pytest benchmarks/bench_attention.py --benchmark-only

All start from the packed output of one projection, (B, N, 3, H, K), and give (B, N, H, K); outputs and gradients are
compared before anything is timed. `SDPA` gets the bias as its mask, written out for every head, as timm does; `eager`
is the softmax by hand, as in the official code.
"""

from __future__ import annotations

import contextlib
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
from beit_fast.kernels.backend import xformers_installed
from benchmarks.harness import OURS, Absent, Comparison, Rival

KERNEL = "beit_fast, its own kernel"
RIVALS = [OURS, KERNEL, "SDPA", "SDPA, cuDNN", "eager", "xformers", "FlexAttention"]


@dataclass(frozen=True)
class Case:
    """bias: "learned", "frozen" or "none"; `backward` with the gradients of qkv and, if learned, of the bias."""

    bias: str
    backward: bool
    window: int
    batch_size: int
    dtype: str
    device: torch.device
    num_heads: int = 12
    head_dim: int = 64

    @property
    def num_tokens(self) -> int:
        return self.window**2 + 1


def cases(scale: Any) -> dict[str, Case]:
    gpu = scale.device.type == "cuda"
    sizes = scale.pick(
        tiny=((2, 2),), cpu=((14, 8),), gpu=((14, 128), (24, 32)),
        full=((14, 128), (14, 256), (24, 64), (32, 16), (40, 8)) if gpu else ((14, 8), (14, 32), (24, 2)),
    )  # fmt: skip
    kinds = [("learned", True), ("learned", False), ("frozen", True), ("none", True), ("none", False)]
    return {
        f"{bias}-N={window**2 + 1}-B={batch}-{'training' if backward else 'inference'}": Case(
            bias, backward, window, batch, scale.dtype, scale.device
        )
        for window, batch in sizes
        for bias, backward in kinds
    }


def attention(case: Case) -> Comparison:
    B, N, H, K = case.batch_size, case.num_tokens, case.num_heads, case.head_dim
    dtype, device, on_gpu = getattr(torch, case.dtype), case.device, case.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, N, 3, H, K, generator=generator).to(device, dtype).requires_grad_(case.backward)
    probe = torch.randn(B, N, H, K, generator=generator).to(device, dtype)
    bias = None
    if case.bias != "none":
        bias = (
            torch.randn(H, N, N, generator=generator)
            .to(device)
            .requires_grad_(case.backward and case.bias == "learned")
        )
    leaves = {name: x for name, x in (("qkv", qkv), ("bias", bias)) if x is not None and x.requires_grad}

    def rival(attend: Callable[[Tensor, Tensor | None], Tensor], within: Any = contextlib.nullcontext) -> Rival:
        def run() -> dict[str, Tensor]:
            with within(), torch.set_grad_enabled(case.backward):
                out = attend(qkv, bias)
                found = {"output": out.detach()}
                if case.backward:
                    gradients = torch.autograd.grad(out, list(leaves.values()), probe)
                    found |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
            return found

        return Rival(run, run)

    def other(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
        return lambda x, b: function(*x.unbind(2), b, K**-0.5)

    def own_kernel() -> Rival:
        if not on_gpu:
            raise Absent("our kernel needs a GPU; on a CPU the row of beit_fast is torch's operations")
        if case.bias != "none":
            raise Absent("is what beit_fast runs where there is a bias")
        return rival(kernels.packed_attention, lambda: kernels.use_backend("triton"))

    def cudnn() -> Rival:
        if not on_gpu:
            raise Absent("cuDNN needs a GPU")
        chosen = rival(other(backends.sdpa), lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
        try:
            chosen.run()
        except RuntimeError as error:
            raise Absent(f"cuDNN's attention does not take this: {str(error).splitlines()[0]}") from None
        return chosen

    def eager(x: Tensor, b: Tensor | None) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * K**-0.5) @ k.transpose(-2, -1)
        scores = scores if b is None else scores + b.to(scores.dtype)
        return (F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)

    def xformers() -> Rival:
        if not xformers_installed():
            raise Absent("xformers is not installed")
        if not on_gpu:
            raise Absent("xformers has no attention for a CPU")
        return rival(other(backends.xformers))

    def flex() -> Rival:
        if not on_gpu and case.backward:
            raise Absent("FlexAttention has no gradient on a CPU")
        return rival(other(backends.flex))

    products = B * H * N * N * K
    values = 4 * B * N * H * K * (2 if case.backward else 1)
    what = {"learned": "a learned bias", "frozen": "a frozen bias", "none": "no bias"}[case.bias]
    return Comparison(
        group=(
            f"attention with {what}, {'forward and backward' if case.backward else 'forward'}: "
            f"B={B}, N={N}, H={H}, K={K}, {case.dtype}"
        ),
        rivals={
            OURS: lambda: rival(kernels.packed_attention),
            KERNEL: own_kernel,
            "SDPA": lambda: rival(other(backends.sdpa)),
            "SDPA, cuDNN": cudnn,
            "eager": lambda: rival(eager),
            "xformers": xformers,
            "FlexAttention": flex,
        },
        shapes={"B": B, "N": N, "H": H, "K": K, "bias": case.bias},
        dtype=case.dtype,
        flops=(14.0 if case.backward else 4.0) * products,
        bytes=values * probe.element_size() + (0 if bias is None else 4.0 * bias.numel() * (1 + case.backward)),
        tolerance=1e-4 if case.dtype == "float32" else 3e-2,
    )


@pytest.mark.parametrize("rival", RIVALS)
def test_attention(in_turns, case, rival):
    in_turns(case, lambda: attention(case), rival)
