"""Models by name, with timm's names and arguments."""

from __future__ import annotations

from typing import Any

from .beit import Beit
from .configs import BeitConfig

_RESOLUTIONS = {"tiny": (224,), "small": (224,), "base": (224, 384), "large": (224, 384, 512)}


def list_models() -> list[str]:
    """Every name that `create_model` knows."""
    return [f"beit_{size}_patch16_{side}" for size, sides in _RESOLUTIONS.items() for side in sides]


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str = "",
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Beit:
    """A BEiT classifier by its timm name.

    Args:
        name: one of `list_models()`.
        pretrained, checkpoint_path: not available yet; models start from random weights.
        num_classes: outputs; 0 leaves the head out.
        img_size: pixels, a side or (height, width); the name's own where None.
        overrides: fields of `BeitConfig`.

    Raises:
        ValueError: the name is unknown, or an argument does not fit.
    """
    if name not in list_models():
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(list_models())}")
    if pretrained or checkpoint_path:
        raise ValueError("loading weights by create_model is not available yet: build the model, then load_state_dict")
    _, size, _, side = name.split("_")
    config = BeitConfig.from_preset(size, "plus", image_size=img_size or int(side), in_chans=in_chans)  # type: ignore[arg-type]
    return Beit(config.for_classification(num_classes, **overrides))
