"""Every fused operation once forward and backward on small, awkward shapes: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m benchmarks.small_shapes
"""

from __future__ import annotations

import argparse

import torch

from beit_fast import BeitConfig, kernels
from benchmarks.models import OurStep, make_batch, make_model


def operations(device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward of each operation; N = 26 and D = 72 fill no tile."""
    torch.manual_seed(0)
    B, H, K, h, w = 3, 2, 64, 5, 5
    N, D = h * w + 1, 72

    def draw(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(device, of).requires_grad_()

    table = draw((2 * h - 1) * (2 * w - 1) + 3, H)
    bias = kernels.relative_position_bias(table, (h, w))
    for given in (kernels.prepare_bias(bias, dtype), None):
        kernels.packed_attention(draw(B, N, 3, H, K, of=dtype), given).float().square().sum().backward()
    q, k, v = (draw(B, N, H, K, of=dtype) for _ in range(3))
    kernels.biased_attention(q, k, v, bias.detach()).float().square().sum().backward()
    drop_path = torch.tensor([0.0, 1.0, 2.0], device=device)
    for gamma, factors in ((draw(D), drop_path), (None, None)):
        total, normed = kernels.residual_layer_norm(
            draw(B, N, D), draw(B, N, D, of=dtype), gamma, factors, draw(D), draw(D), 1e-6, draw(D)
        )
        (total.square().sum() + normed.float().square().sum()).backward()
        kernels.residual_add(draw(B, N, D), draw(B, N, D, of=dtype), gamma, factors, draw(D)).sum().backward()
    kernels.bias_gelu(draw(B, N, 4 * D, of=dtype), draw(4 * D)).float().sum().backward()
    rows, targets = torch.arange(7, device=device) * 3, torch.tensor([1, 2, 3, -100, 4, 0, 5], device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss, _ = kernels.masked_cross_entropy(draw(B * N, D), rows, targets, draw(D), draw(D), draw(50, D), draw(50))
        loss.backward()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    dtypes = [torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float16]
    for dtype in dtypes:
        operations(device, dtype)
        for preset in ("plus", "plain"):
            config = BeitConfig.from_preset(
                "tiny", preset, width=128, num_heads=2, depth=2, image_size=(80, 96), vocab_size=100
            )
            step = OurStep(make_model(config, device).train(), make_batch(config, 3, device), dtype)
            assert step().isfinite()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"every operation ran forward and backward on {device} in {', '.join(str(d) for d in dtypes)}")


if __name__ == "__main__":
    main()
