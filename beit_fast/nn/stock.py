"""When a fused op may stand for the modules whose parameters it takes, and when they have to be called themselves."""

from __future__ import annotations

from torch import Tensor, nn

from beit_fast import kernels


def is_stock(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling the module runs the `forward` of exactly one of these classes and nothing else.

    It does not where it has hooks (feature extraction, pruning, FSDP), or was replaced (LoRA, quantisation) or
    parametrised: then whoever did that expects the module to be called.
    """
    return type(module) in kinds and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def linear_without_bias(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear layer gives, and the bias that it has not added yet (none where the layer has been touched)."""
    if is_stock(linear, nn.Linear):
        return kernels.linear(x, linear.weight), linear.bias  # type: ignore[arg-type, return-value]
    return linear(x), None


def product_of(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer gives, by the fastest product."""
    if is_stock(linear, nn.Linear):
        return kernels.linear(x, linear.weight, linear.bias)  # type: ignore[arg-type]
    result: Tensor = linear(x)
    return result
