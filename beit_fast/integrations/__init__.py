"""Makes the BEiTs of timm and transformers faster in place, and undoes it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TypeVar

from torch import nn

from beit_fast.models import Beit, BeitFeatures, BeitForMaskedImageModeling

Model = TypeVar("Model", bound=nn.Module)

_LIBRARIES = {"timm.models.beit": "timm_beit", "transformers.models.beit.modeling_beit": "transformers_beit"}
_SUPPORTED = (
    "timm's Beit and transformers' BeitModel, BeitForImageClassification, BeitForMaskedImageModeling, "
    "BeitForSemanticSegmentation and BeitBackbone"
)


def accelerate(model: Model) -> Model:
    """Let a BEiT of timm or transformers run on the kernels of this library, in place.

    Its blocks (and in transformers' masked image modelling its head) take another class, a subclass of their own with
    another `forward`. Parameters, their names, buffers, hooks, drop path and its random numbers, outputs and gradients
    stay what they were, up to rounding; optimizers, checkpoints, DistributedDataParallel, torch.compile, autocast,
    copies and pickles work as before. A block in which something is not as it was made (active dropout, a replaced
    module, a hook on its attention or MLP, attention weights requested) runs its own `forward` as long as that is so.
    The logits of a masked image model that is given labels are computed when they are first read, which has to happen
    before the weights change.

    Args:
        model: a BEiT, or any module that holds some. One that is of this library, or accelerated, is left as it is.

    Returns:
        The same object.

    Raises:
        ValueError: there is no BEiT in it, or one of a kind that is not supported; the model is then as it was.

    Examples:
        >>> import timm, torch, beit_fast
        >>> model = timm.create_model("beit_base_patch16_224", depth=2).eval()
        >>> images = torch.zeros(1, 3, 224, 224)
        >>> with torch.no_grad():
        ...     before = model(images)
        ...     after = beit_fast.accelerate(model)(images)
        >>> torch.allclose(before, after, atol=1e-5)
        True
    """
    if isinstance(model, (Beit, BeitFeatures, BeitForMaskedImageModeling)):
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(f"accelerate takes a model, not {model!r}: accelerate(timm.create_model({model!r}))")
    libraries = _loaded_libraries()
    faster = {own: ours for library in libraries for own, ours in library.FASTER.items()}
    for library in libraries:
        library.check(model)
    kinds = {type(module) for module in model.modules()}
    if kinds.isdisjoint({*faster.keys(), *faster.values()}):
        raise ValueError(f"nothing to accelerate in {type(model).__name__}; supported are {_SUPPORTED}")
    _swap_classes(model, faster)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place.

    Args:
        model: one that was accelerated; any other stays as it is.

    Returns:
        The same object.

    Examples:
        >>> import timm, beit_fast
        >>> model = beit_fast.accelerate(timm.create_model("beit_base_patch16_224", depth=1))
        >>> type(beit_fast.restore(model).blocks[0]).__module__
        'timm.models.beit'
    """
    for library in _loaded_libraries():
        _swap_classes(model, {ours: own for own, ours in library.FASTER.items()})
    return model


def _swap_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


def _loaded_libraries() -> list[ModuleType]:
    """Our module for each library that is imported; a model can be of no other."""
    return [
        importlib.import_module(f"{__name__}.{ours}") for theirs, ours in _LIBRARIES.items() if theirs in sys.modules
    ]


__all__ = ["accelerate", "restore"]
