"""Models by name, with timm's names and arguments."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch

from beit_fast.models.beit import Beit
from beit_fast.models.checkpoints import load_checkpoint
from beit_fast.models.configs import BeitConfig, model_names, named_config, timm_fields
from beit_fast.models.features import BeitFeatures
from beit_fast.models.hub import config_at, weights_at

_MEAN_V2, _STD_V2 = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_V1_1K, _V1_22K = "in22k_ft_in22k_in1k", "in22k_ft_in22k"
_V2_1K, _V2_1K_ALONE, _V2_22K = "in1k_ft_in22k_in1k", "in1k_ft_in1k", "in1k_ft_in22k"

# Of each name, the weights that timm publishes under `timm/<name>.<tag>`; the first is the default.
_TAGS = {
    "beit_base_patch16_224": (_V1_1K, _V1_22K),
    "beit_base_patch16_384": (_V1_1K,),
    "beit_large_patch16_224": (_V1_1K, _V1_22K),
    "beit_large_patch16_384": (_V1_1K,),
    "beit_large_patch16_512": (_V1_1K,),
    "beitv2_base_patch16_224": (_V2_1K, _V2_1K_ALONE, _V2_22K),
    "beitv2_large_patch16_224": (_V2_1K, _V2_1K_ALONE, _V2_22K),
}
# Arguments of timm's factory that mean nothing here.
_MEANINGLESS = ("scriptable", "exportable", "no_jit")


def list_models(
    filter: str | Iterable[str] = "", pretrained: bool = False, exclude_filters: str | Iterable[str] = ""
) -> list[str]:
    """List the names that `create_model` knows, with timm's arguments.

    Args:
        filter: wildcards of the names to list, one or several; all names where it is empty.
        pretrained: only names with published weights, each followed by the tag of these weights.
        exclude_filters: wildcards of names to leave out.

    Returns:
        The names that fit; none where nothing does.

    Examples:
        >>> import beit_fast
        >>> beit_fast.list_models("beit_base*")
        ['beit_base_patch16_224', 'beit_base_patch16_384']
        >>> beit_fast.list_models("beit_base*_224", pretrained=True)
        ['beit_base_patch16_224.in22k_ft_in22k_in1k', 'beit_base_patch16_224.in22k_ft_in22k']
    """
    wanted, unwanted = ([f] if isinstance(f, str) and f else list(f) for f in (filter, exclude_filters))

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch(name, p) or (pretrained and "." not in p and fnmatch(name, f"{p}.*")) for p in patterns)

    names = [f"{base}.{tag}" for base, tags in _TAGS.items() for tag in tags] if pretrained else model_names()
    return [name for name in names if (not wanted or matches(name, wanted)) and not matches(name, unwanted)]


def create_model(
    name: str = "",
    pretrained: bool | str | Path = False,
    checkpoint_path: str | Path = "",
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Beit:
    """Make a BEiT (or BEiT v2, the same backbone) by its timm name, with timm's arguments.

    Args:
        name: one of `list_models()`, with or without a tag (`beit_base_patch16_224.in22k_ft_in22k`); or, as in timm,
            "local-dir:FOLDER" or "hf-hub:owner/name" for the architecture found there. Without one it is that of
            `pretrained`, a finished run or a folder with a `config.json`.
        pretrained: True fetches the weights timm publishes under that name and tag; a path or "hf-hub:owner/name" takes
            others. They are resized to `img_size`, and their head is kept if it has `num_classes` outputs.
        checkpoint_path: a file to load, as `models.load_checkpoint` reads it.
        num_classes: outputs; 0 leaves the head out; None: 1000, or 21841 where the tag's weights have as many, or as
            many as a folder has.
        in_chans: colour channels.
        img_size: pixels, a side or (height, width); the name's own where None. Any other size works at run time, too.
        overrides: `features_only` and `out_indices` (then the result is a `BeitFeatures`); `global_pool`,
            `drop_path_rate`, `drop_rate`, `use_fc_norm`, `norm_layer`, `depth`, `embed_dim`, ... of timm; any field of
            `BeitConfig`; `cache_dir`, `device` and `dtype`; `ema=False` for the weights that are no average.

    Returns:
        A `Beit`: images (B, in_chans, S, S) to logits (B, num_classes); or a `BeitFeatures`: images to a list of maps
        (B, D, h, w).

    Raises:
        ValueError: the name or an argument is unknown or does not fit; CheckpointError, a ValueError, for weights.

    Examples:
        >>> import torch, beit_fast
        >>> model = beit_fast.create_model("beit_tiny_patch16_224", num_classes=10).eval()
        >>> model(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 10])
        >>> maps = beit_fast.create_model("beit_tiny_patch16_224", features_only=True, out_indices=(3, 11))
        >>> [tuple(m.shape) for m in maps(torch.zeros(1, 3, 64, 96))]
        [(1, 192, 4, 6), (1, 192, 4, 6)]
    """
    found = None
    if name.startswith(("local-dir:", "hf-hub:")) or not name:
        source = name.removeprefix("local-dir:") or pretrained
        found, pretrained = _architecture_at(source), source if pretrained else False
        name = "beit_base_patch16_224"
    base, _, tag = name.partition(".")
    tag = _tag_of(overrides.pop("pretrained_cfg", None), tag)
    if overrides.pop("pretrained_cfg_overlay", None):
        raise ValueError("pretrained_cfg_overlay is not supported: give the weights as pretrained= or checkpoint_path=")
    if base not in model_names() or (tag and tag not in _TAGS.get(base, ())):
        known = ", ".join(f"{base}.{t}" for t in _TAGS.get(base, ())) or ", ".join(model_names())
        hint = "; for weights elsewhere give pretrained= a path or 'hf-hub:owner/name'" if ":" in name else ""
        full_name = name if "." in name or not tag else f"{name}.{tag}"
        raise ValueError(f"model {full_name!r} is unknown; choose one of {known}{hint}")
    tag = tag or _TAGS.get(base, ("",))[0]
    options = {key: value for key, value in overrides.items() if value is not None and key not in _MEANINGLESS}
    features_only, out_indices = options.pop("features_only", False), options.pop("out_indices", 3)
    norm, output_fmt = options.pop("norm", False), options.pop("output_fmt", "NCHW")
    cache_dir, device, dtype = (options.pop(key, None) for key in ("cache_dir", "device", "dtype"))
    norm_layer, ema = options.pop("norm_layer", None), options.pop("ema", True)
    classes = (21841 if tag in (_V1_22K, _V2_22K) else 1000) if num_classes is None else num_classes
    config = named_config(base)
    if found is not None:
        config, in_chans = found, found.in_chans if in_chans == 3 else in_chans
        classes = found.num_classes if num_classes is None else num_classes
    config = replace(config, image_size=img_size or config.image_size, in_chans=in_chans)
    with torch.device(device) if device is not None else nullcontext():
        model = Beit(config.for_classification(classes, **timm_fields(options)))
        if norm_layer is not None:
            model.replace_norms(norm_layer)
    if dtype is not None:
        model.to(dtype)
    model.default_cfg = _default_cfg(base, tag, classes, config)
    if pretrained:
        if pretrained is True and base not in _TAGS:
            raise ValueError(f"no weights are published for {base!r}; give pretrained= a path or 'hf-hub:owner/name'")
        source = f"hf-hub:timm/{base}.{tag}" if pretrained is True else pretrained
        load_checkpoint(model, weights_at(source, cache_dir=cache_dir))
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path, ema=ema)
    if features_only:
        return cast(Beit, BeitFeatures(model, out_indices, norm=norm, output_fmt=output_fmt))
    return model


def _architecture_at(source: Any) -> BeitConfig:
    """The architecture that a run, a folder or a repository of the hub describes."""
    if isinstance(source, bool):
        raise ValueError("create_model needs a name, or pretrained= a run, a folder or 'hf-hub:owner/name'")
    config, _ = config_at(source)
    if config is None:
        known = "it does not exist" if not Path(source).exists() else "it has no config.json"
        raise ValueError(f"{source}: {known}, so its architecture is unknown; give the name of the model, too")
    return config


def published_as(name: str) -> str:
    """Where timm publishes the weights of this name, with or without a tag, as "hf-hub:timm/...".

    Raises:
        ValueError: no weights of this name are published.
    """
    base, _, tag = name.partition(".")
    tags = _TAGS.get(base, ())
    if not tags or (tag and tag not in tags):
        known = ", ".join(f"{base}.{t}" for t in tags) or ", ".join(_TAGS)
        raise ValueError(f"no weights are published as {name!r}; there are {known}")
    return f"hf-hub:timm/{base}.{tag or tags[0]}"


def _tag_of(pretrained_cfg: Any, tag: str) -> str:
    """The tag of the weights: timm passes the one it has cut off a registered name as `pretrained_cfg`."""
    if pretrained_cfg is None:
        return tag
    if not isinstance(pretrained_cfg, str):
        raise ValueError("pretrained_cfg is not supported: give the weights as pretrained= or checkpoint_path=")
    return pretrained_cfg


def _default_cfg(base: str, tag: str, num_classes: int, config: BeitConfig) -> dict[str, Any]:
    """What timm states of these weights, for `timm.data.resolve_data_config` and the like."""
    v2 = base.startswith("beitv2")
    closer = base.startswith("beitv2_large") and tag != _V2_22K
    return {
        "architecture": base,
        "tag": tag,
        "hf_hub_id": f"timm/{base}.{tag}" if tag else None,
        "num_classes": num_classes,
        "input_size": (config.in_chans, *config.image_hw),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.95 if closer else 0.9 if base.endswith("224") else 1.0,
        "mean": _MEAN_V2 if v2 else (0.5, 0.5, 0.5),
        "std": _STD_V2 if v2 else (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
