"""Lets timm be imported beside a CPU-only torch.

timm imports torchvision, whose wheel is built for CUDA and cannot load its operators beside a CPU build of torch; the
import then fails because torchvision registers fake implementations for operators that do not exist. Their schemas are
all that is missing: none of them is ever called by BEiT.
"""

from __future__ import annotations

import importlib.util

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def make_torchvision_importable() -> None:
    """Registers the schemas that torchvision's fake registrations name, where its own operators did not load."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except (RuntimeError, OSError):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)
        import torchvision  # noqa: F401
