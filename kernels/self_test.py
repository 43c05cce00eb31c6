"""Every op once on this machine, forward and backward, against its definition in float64: two seconds, for `doctor`."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LIMIT = 1e-3
"""Relative error above which an op is called wrong. Loose on purpose: this finds broken builds, tests find rounding."""


def _inputs(name: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an op, float64 on the CPU; floating tensors get gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if name == "biased_attention":
        return [normal(2, 17, 2, 64) for _ in range(3)] + [normal(2, 17, 17)], {"scale": 0.125}
    if name == "relative_position_bias":
        return [normal(52, 2), (4, 4)], {}
    if name == "residual_layer_norm":
        keep = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return [normal(2, 17, 64), normal(2, 17, 64), normal(64), keep, normal(64), normal(64)], {"eps": 1e-6}
    if name == "bias_gelu":
        return [normal(2, 17, 64), normal(64)], {}
    rows, targets = torch.arange(0, 34, 2), torch.arange(17)
    return [normal(34, 64), rows, targets, normal(64), normal(64), normal(96, 64), normal(96)], {}


OPS = {
    "biased_attention": "attention",
    "relative_position_bias": "position_bias",
    "residual_layer_norm": "residual_norm",
    "bias_gelu": "gelu",
    "masked_cross_entropy": "mim_loss",
}


def _run(op: Callable[..., Any], name: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients, float64 on the CPU."""
    arguments, options = _inputs(name)
    moved = []
    for value in arguments:
        if isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() else None)
            value.requires_grad_(value.is_floating_point() and value.dim() != 1 or value.shape[-1] == 64)  # noqa: RUF021
        moved.append(value)
    result = op(*moved, **options)
    results = [r for r in (result if isinstance(result, tuple) else (result,)) if r.is_floating_point()]
    leaves = [v for v in moved if isinstance(v, Tensor) and v.requires_grad]
    gradients = torch.autograd.grad(torch.stack([r.sin().sum() for r in results]).sum(), leaves, allow_unused=True)
    return [t.detach().double().cpu() for t in (*results, *gradients) if t is not None]


def self_test(device: torch.device) -> Iterator[tuple[str, float | str]]:
    """(op, largest relative error of its results and gradients, or what it raised) in float32 on `device`."""
    for name, folder in OPS.items():
        definition = getattr(importlib.import_module(f"beit_fast.kernels.{folder}.reference"), name)
        try:
            op = getattr(importlib.import_module("beit_fast.kernels"), name)
            found = _run(op, name, device, torch.float32)
            right = _run(definition, name, torch.device("cpu"), torch.float64)
            errors = [
                float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in zip(found, right, strict=True)
            ]
            yield name, max(errors)
        except Exception as error:  # whatever a broken build raises is the finding
            yield name, f"{type(error).__name__}: {error}".splitlines()[0]
