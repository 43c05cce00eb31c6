"""Open a classifier from any supported checkpoint: its model, its classes, and how its images were prepared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from beit_fast.data.arrays.statistics import normalization_of
from beit_fast.data.classification import default_crop_share
from beit_fast.models import Beit, BeitConfig
from beit_fast.models.checkpoints import load_checkpoint
from beit_fast.models.create import list_models, published_as
from beit_fast.models.hub import config_at, weights_at
from beit_fast.models.key_names import to_official
from beit_fast.models.reading import CheckpointError, read_state_dict

_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode and what it expects."""

    model: Beit
    classes: tuple[str, ...]
    """Names of its outputs; numbers where the file has no names."""
    image_size: int | tuple[int, int]
    crop_share: float
    """Share of the shorter side that the centre crop covers."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int | None = None
    """Of its images, where they keep their depth; None: RGB of 8 bits."""
    value_range: tuple[float, float] | None = None
    """Values of pixels that are black and white, where its images have a range."""


def local_source(source: str | Path) -> Path:
    """The local path of a model: a path as it is; a name of timm or of the hub fetched, with its `config.json`.

    Raises:
        CheckpointError: (a ValueError) it cannot be fetched.
    """
    name = str(source)
    if not Path(name).exists() and name.partition(".")[0] in list_models():
        name = published_as(name)
    if not name.startswith("hf-hub:"):
        return Path(source)
    config_at(name)
    return weights_at(name).parent


def open_classifier(path: str | Path, image_size: int | None = None) -> Classifier:
    """The classifier of a fine-tuning run, of a folder with a `config.json` (ours, timm's, transformers'), or of a file
    of any of them or of the official code, whose architecture is then read off its tensors; or a name that is fetched,
    of timm or "hf-hub:owner/name".

    Args:
        image_size: pixels, in place of the file's own; position tables are resized.

    Raises:
        CheckpointError: (a ValueError) it cannot be read, or holds no classifier.
    """
    root = local_source(path)
    if (root / "model" / "preprocessing.json").is_file():
        root = root / "model"
    elif (root / "checkpoints").is_dir():
        raise CheckpointError(f"{root}: this run has not finished and left no classifier; name a file of weights")
    changes: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    described: dict[str, Any] = {}
    if (root / "config.json").is_file():
        model = Beit.from_pretrained(root, **changes)
        described = read_description(root)
    else:
        config = architecture_of(read_state_dict(root), str(root))
        model = Beit(replace(config, **changes))
        load_checkpoint(model, root)
        model.eval()
    if not model.num_classes:
        raise CheckpointError(
            f"{root}: holds no classifier, but a backbone; fine-tune it first: beit-fast train finetune_imagenet_base "
            f"--weights {path}"
        )
    height, width = model.config.image_hw
    size = height if height == width else (height, width)
    channels = described.get("channels") or (None if model.config.in_chans == 3 else model.config.in_chans)
    mean, std = normalization_of("half", channels)
    names = described.get("classes") or [str(number) for number in range(model.num_classes)]
    # A crop share belongs to the size it was chosen for.
    share = described.get("crop_share") if image_size is None else None
    return Classifier(
        model, tuple(names), size, share or default_crop_share(size),
        tuple(described.get("mean") or mean), tuple(described.get("std") or std), channels,
        tuple(described["value_range"]) if described.get("value_range") else None,
    )  # fmt: skip


def architecture_of(state: Mapping[str, Tensor], source: str, classifier: bool = True) -> BeitConfig:
    """The configuration of a square-image classifier, from the shapes of its tensors; or, without `classifier`, of a
    backbone that need not have a head.

    The width of a head is that of a relative table's heads, or 64 where there is no table.

    Raises:
        CheckpointError: tensors are missing, or there is no head.
    """
    try:
        tensors, _ = to_official(state)
        projection, hidden = tensors["patch_embed.proj.weight"], tensors["blocks.0.mlp.fc1.weight"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: not the weights of a BEiT ({error})") from error
    if classifier and "head.weight" not in tensors:
        raise CheckpointError(f"{source}: holds no classifier (no head.weight); fine-tune it first")
    width, channels, patch, _ = projection.shape
    own = tensors.get(f"blocks.0.attn.{_TABLE}")
    shared = tensors.get(f"rel_pos_bias.{_TABLE}")
    table = own if own is not None else shared
    positions = tensors.get("pos_embed")
    if table is not None:
        side = (math.isqrt(len(table) - 3) + 1) // 2
    elif positions is not None:
        side = math.isqrt(positions.shape[1] - 1)
    else:
        raise CheckpointError(f"{source}: has neither relative position tables nor a position embedding")
    return BeitConfig(
        image_size=side * patch, patch_size=patch, in_chans=channels, width=width,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        num_heads=table.shape[1] if table is not None else width // 64,
        mlp_ratio=hidden.shape[0] / width,
        use_abs_pos_emb=positions is not None,
        relative_position_bias="per_block" if own is not None else "shared" if shared is not None else "none",
        layer_scale_init=0.1 if "blocks.0.gamma_1" in tensors else None,
        num_classes=tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
        global_pool="avg" if "fc_norm.weight" in tensors else "token",
    )  # fmt: skip


def read_description(folder: Path) -> dict[str, Any]:
    """Classes and preprocessing, as far as our, timm's or transformers' files of a folder tell."""
    own, config = _json(folder / "preprocessing.json"), _json(folder / "config.json")
    if own:
        return own
    found: dict[str, Any] = {}
    timm = config.get("pretrained_cfg", {})
    found |= {name: timm[name] for name in ("mean", "std") if name in timm}
    found |= {"crop_share": timm["crop_pct"]} if "crop_pct" in timm else {}
    if "label_names" in config:
        found["classes"] = config["label_names"]
    if isinstance(config.get("id2label"), dict):
        found["classes"] = [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
    processor = _json(folder / "preprocessor_config.json")
    found |= {new: processor[old] for new, old in (("mean", "image_mean"), ("std", "image_std")) if old in processor}
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return values
