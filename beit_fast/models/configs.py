"""The architecture of a BEiT as one frozen dataclass, and the sizes and presets that have names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, cast

Size = Literal["tiny", "small", "base", "large"]
Preset = Literal["plain", "plus"]

_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "depth": 12, "num_heads": 3},
    "small": {"width": 384, "depth": 12, "num_heads": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
}
_RESOLUTIONS: dict[str, tuple[int, ...]] = {
    "tiny": (224,),
    "small": (224,),
    "base": (224, 384),
    "large": (224, 384, 512),
}
_RENAMED = {"embed_dim": "width", "init_values": "layer_scale_init", "img_size": "image_size"}
# Arguments of timm's class that change what BEiT is.
_FIXED = {"swiglu_mlp": False, "scale_mlp": False, "feature_cls": "getter"}
_LAYER_SCALE_INIT = {"tiny": 0.1, "small": 0.1, "base": 0.1, "large": 1e-5}


class ArgumentError(ValueError, TypeError, AssertionError):
    """An argument of timm's that is unknown or unsupported; timm raises one or another of these for it."""


@dataclass(frozen=True)
class BeitConfig:
    """Architecture and initialisation of a BEiT.

    Raises:
        ValueError: a size is not positive, a choice is unknown, the image is not a multiple of the patch, or the width
            of the heads.

    Examples:
        >>> from beit_fast import BeitConfig
        >>> config = BeitConfig.from_preset("base", "plain")
        >>> config.width, config.grid, config.relative_position_bias
        (768, (14, 14), 'none')
    """

    image_size: int | tuple[int, int] = 224
    """Side in pixels, or (height, width)."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    in_chans: int = 3
    """Colour channels."""
    width: int = 768
    """D, the size of a token."""
    depth: int = 12
    """L, the number of blocks."""
    num_heads: int = 12
    """H."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over D."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    use_abs_pos_emb: bool = False
    """Learned absolute position embedding (preset `plain`)."""
    relative_position_bias: Literal["none", "shared", "per_block"] = "shared"
    """One table for all blocks (pre-training, preset `plus`), one for each (fine-tuning), or none (`plain`)."""
    layer_scale_init: float | None = 0.1
    """Start value of LayerScale; None leaves it out (preset `plain`)."""
    drop_path_rate: float = 0.0
    """Drop rate of the last block; the rate grows linearly from 0 at the first."""
    drop_rate: float = 0.0
    """Dropout before the classifier's head; BEiT uses none, nor any of the three below."""
    pos_drop_rate: float = 0.0
    """Dropout of the tokens before the first block."""
    attn_drop_rate: float = 0.0
    """Dropout of the attention probabilities, which are then computed by plain formulas."""
    proj_drop_rate: float = 0.0
    """Dropout after the output projection of the attention and after both layers of the MLP."""
    qkv_bias: bool = True
    """Biases of queries and values."""
    vocab_size: int = 8192
    """V, the number of visual tokens."""
    mim_target: Literal["visual_tokens", "pixels"] = "visual_tokens"
    """What masked image modelling predicts: visual tokens, or the pixels of a patch (an ablation of table 4)."""
    head_layers: int = 0
    """Extra blocks of BEiT v2's second head in masked image modelling, which make CLS a summary; 0: there is none."""
    early_layers: int = 0
    """Blocks after which that head takes the patch tokens: 9 of 12 in the base model, 21 of 24 in the large one."""
    num_classes: int = 1000
    """Outputs of the classifier; 0 leaves its head out."""
    global_pool: Literal["avg", "token", ""] = "avg"
    """What the classifier reads: the mean of the patch tokens, the CLS token, or all tokens."""
    use_fc_norm: bool | None = None
    """Normalise after pooling (`fc_norm`) instead of before (`norm`); None: where the pooling is by the mean."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    head_init_scale: float = 0.001
    """Factor on the classifier's initial weights."""

    def __post_init__(self) -> None:
        height, width = self.image_hw
        for name in ("patch_size", "in_chans", "width", "depth", "num_heads", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if height <= 0 or width <= 0 or height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image_size {height}x{width} is not a multiple of patch_size {self.patch_size}")
        if self.mim_target not in ("visual_tokens", "pixels"):
            raise ValueError(f"mim_target must be visual_tokens or pixels, got {self.mim_target!r}")
        if self.head_layers and not 0 < self.early_layers < self.depth:
            raise ValueError(
                f"early_layers must lie between 1 and {self.depth - 1}, one less than the blocks, with head_layers "
                f"{self.head_layers}; got {self.early_layers}"
            )
        if self.head_layers and self.mim_target == "pixels":
            raise ValueError("head_layers needs mim_target visual_tokens: BEiT v2's extra head predicts tokens")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not isinstance(self.mlp_ratio, int | float) or self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be a positive number, got {self.mlp_ratio!r}")
        if not isinstance(self.num_classes, int) or self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {self.num_classes!r}")
        for name in (
            "layer_norm_eps",
            "drop_path_rate",
            "drop_rate",
            "pos_drop_rate",
            "attn_drop_rate",
            "proj_drop_rate",
        ):
            if not isinstance(value := getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
        choices = {"global_pool": ("avg", "token", ""), "relative_position_bias": ("none", "shared", "per_block")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name} {getattr(self, name)!r} is unknown; choose one of {known}")

    @cached_property
    def image_hw(self) -> tuple[int, int]:
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def norm_after_pooling(self) -> bool:
        """Whether the classifier has an `fc_norm` (and no `norm`)."""
        return self.global_pool == "avg" if self.use_fc_norm is None else self.use_fc_norm

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(h, w), the patches down and across."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @staticmethod
    def from_preset(size: Size, preset: Preset = "plus", **overrides: Any) -> BeitConfig:
        """The configuration for pre-training.

        `plain` is that of the paper's main tables: absolute position embedding, no LayerScale, no relative bias.
        `plus` is that of the paper's appendix A and of the released ImageNet-22k weights: LayerScale and a relative
        position bias, one table shared by all blocks.

        Raises:
            ValueError: the size or the preset is unknown.
        """
        if size not in _SIZES:
            raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(_SIZES)}")
        if preset not in ("plain", "plus"):
            raise ValueError(f"preset {preset!r} is unknown; choose plain or plus")
        plus = preset == "plus"
        values: dict[str, Any] = {
            **_SIZES[size],
            "use_abs_pos_emb": not plus,
            "relative_position_bias": "shared" if plus else "none",
            "layer_scale_init": _LAYER_SCALE_INIT[size] if plus else None,
        }
        return BeitConfig(**{**values, **overrides})

    def for_classification(self, num_classes: int = 1000, **overrides: Any) -> BeitConfig:
        """The same architecture as it is fine-tuned: a table for each block, without an extra head."""
        tables = "per_block" if self.relative_position_bias == "shared" else self.relative_position_bias
        values: dict[str, Any] = {"num_classes": num_classes, "relative_position_bias": tables, "head_layers": 0}
        return replace(self, **{**values, **overrides})


def model_names() -> list[str]:
    """timm's names of the architectures, and those of the two smaller sizes."""
    names = [f"beit_{size}_patch16_{side}" for size, sides in _RESOLUTIONS.items() for side in sides]
    return [*names, "beitv2_base_patch16_224", "beitv2_large_patch16_224"]


def named_config(name: str) -> BeitConfig:
    """The configuration, as for pre-training, of one of `model_names()`.

    Raises:
        ValueError: it is none of them.
    """
    if name not in model_names():
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(model_names())}")
    family, size, _, side = name.split("_")
    overrides = {"layer_scale_init": 1e-5} if family == "beitv2" else {}
    return BeitConfig.from_preset(cast(Size, size), "plus", image_size=int(side), **overrides)


def timm_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """timm's arguments of a BEiT as fields of `BeitConfig`, whose own names are taken, too.

    Raises:
        ValueError: an argument is unknown, or asks for what BEiT is not.
    """
    known = {field.name for field in fields(BeitConfig)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        field = _RENAMED.get(key, key)
        if key in _FIXED:
            if value != _FIXED[key]:
                raise ValueError(f"{key}={value!r} is not supported: BEiT has {key}={_FIXED[key]!r}")
        elif key == "patch_size" and not isinstance(value, int):
            values[field] = _square(value)
        elif field in known:
            values[field] = value
        elif key not in ("use_rel_pos_bias", "use_shared_rel_pos_bias"):
            close = difflib.get_close_matches(key, [*known, *_RENAMED, *_FIXED, "features_only", "out_indices"], 1)
            raise ArgumentError(f"argument {key!r} is unknown" + (f"; did you mean {close[0]!r}?" if close else ""))
    shared, own = options.get("use_shared_rel_pos_bias", False), options.get("use_rel_pos_bias", True)
    if shared and options.get("use_rel_pos_bias", False):
        raise ValueError("use_rel_pos_bias and use_shared_rel_pos_bias: choose one table for each block or one for all")
    if "use_rel_pos_bias" in options or shared:
        values["relative_position_bias"] = "shared" if shared else "per_block" if own else "none"
    return values


def _square(patch_size: Any) -> int:
    """timm also takes (side, side)."""
    sides = set(patch_size)
    if len(sides) != 1:
        raise ValueError(f"patch_size {tuple(patch_size)} is not supported: patches are square")
    return int(sides.pop())
