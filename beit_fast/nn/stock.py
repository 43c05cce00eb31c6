"""Which modules a fused op may stand in for, and which have to be called themselves."""

from __future__ import annotations

from torch import nn


def is_stock(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling the module runs the `forward` of exactly one of these classes and nothing else.

    It does not where it has hooks (feature extraction, pruning, FSDP), or was replaced (LoRA, quantisation) or
    parametrised: then the module itself has to be called.
    """
    return type(module) in kinds and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def all_stock(*modules_and_kinds: tuple[nn.Module, type[nn.Module]]) -> bool:
    """Whether `is_stock` holds for every module and its class; one call, because models ask it in every pass."""
    for module, kind in modules_and_kinds:
        if type(module) is not kind or (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        ):
            return False
    return True
