"""Initial weights of a run: from another run, a file, the hub or timm; and what they say of the model to make."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from beit_fast.data.loader import NORMALIZATION
from beit_fast.models.checkpoints import LoadReport, load_checkpoint
from beit_fast.models.configs import BeitConfig
from beit_fast.models.create import list_models, published_as
from beit_fast.models.hub import config_at, weights_at
from beit_fast.models.reading import read_state_dict
from beit_fast.train.checkpoint.format import newest_checkpoint, read_verified, write_tensors
from beit_fast.train.checkpoint.resharding import whole_tensors
from beit_fast.train.evaluation.classifiers import architecture_of, read_description

ARCHITECTURE = (
    "size", "preset", "width", "depth", "num_heads", "patch_size", "use_abs_pos_emb", "layer_scale_init"
)  # fmt: skip
"""Fields of `ModelConfig` that weights decide."""


@dataclass(frozen=True)
class WeightsDescription:
    """What weights say of the model that takes them."""

    model: dict[str, Any]
    """Values of the fields `ARCHITECTURE` and `image_size` of a `ModelConfig`."""
    normalization: str | None
    """Name or file of the mean and deviation of the pixels they were trained with, where that is known."""
    data: dict[str, Any] = field(default_factory=dict)
    """Values of `channels` and `value_range` of an `ImageDataConfig`, where the images were not RGB of 8 bits."""


def resolve_weights(path: str | Path) -> Path:
    """The local file or folder of weights that `path` means: of a run folder its newest sound checkpoint.

    Args:
        path: a run folder, a file or folder of weights, "hf-hub:owner/name", or a name of timm
            (`beit_base_patch16_224.in22k_ft_in22k`), which is fetched.

    Raises:
        ValueError: a run folder without a checkpoint, or what cannot be fetched; the rest is up to `load_checkpoint`.
    """
    root = Path(path)
    if not root.exists():
        name = str(path)
        return weights_at(published_as(name) if name.partition(".")[0] in list_models() else name)
    if not (root / "checkpoints").is_dir():
        return root / "model" if (root / "model" / "config.json").is_file() else root
    if saved_config(root).get("lora", {}).get("rank"):  # its checkpoints hold weights and updates apart
        if not (root / "model" / "config.json").is_file():
            raise ValueError(f"{root} trains with --lora.rank and is not complete: its weights are merged at its end")
        return root / "model"
    newest, rejected = newest_checkpoint(root / "checkpoints")
    if newest is None:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in rejected)
        raise ValueError(f"{root} is a run folder without a sound checkpoint{f' ({reasons})' if reasons else ''}")
    return newest.path


@contextlib.contextmanager
def weights_file(path: str | Path) -> Iterator[Path]:
    """The file or folder, as `models.read_state_dict` takes it, of what `path` means (`resolve_weights`).

    Of a checkpoint that keeps averaged weights, those; parts that FSDP2 wrote are joined in a temporary file.
    """
    source = resolve_weights(path)
    if not (source / "manifest.json").is_file() or not (checkpoint := read_verified(source)).has("ema"):
        name = "model"
        if not (source / name).is_dir():
            yield source
            return
        checkpoint = read_verified(source)
    else:
        name = "ema"
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.safetensors"
        write_tensors(whole, dict(whole_tensors(checkpoint, name)))
        yield whole


def load_weights(model: nn.Module, path: str | Path, verbose: bool = True) -> LoadReport:
    """Load what `path` means (`weights_file`) into `model`, as `models.load_checkpoint` does; prints its report."""
    with weights_file(path) as file:
        return load_checkpoint(model, file, verbose=verbose)


def describe_weights(path: str | Path) -> WeightsDescription:
    """Read the architecture and the normalisation of what `path` means, as `resolve_weights` takes it.

    Raises:
        ValueError: they cannot be read, or describe a model that `ModelConfig` cannot: another MLP ratio.
    """
    run = saved_config(path)
    if "model" in run:
        values = {name: run["model"][name] for name in (*ARCHITECTURE, "image_size") if name in run["model"]}
        if isinstance(values.get("image_size"), list):
            values["image_size"] = tuple(values["image_size"])
        seen = run.get("data", {})
        kept = Path(path) / "model" / "preprocessing.json"  # what a file of statistics said; that may be gone
        named = seen.get("normalization") in (*NORMALIZATION, None) or not kept.is_file()
        normalization = seen.get("normalization") if named else str(kept)
        own = {name: seen[name] for name in ("channels", "value_range") if seen.get(name) is not None}
        return WeightsDescription(values, normalization, {k: _tuple(v) for k, v in own.items()})
    name = str(path)
    if not Path(path).exists() and name.partition(".")[0] in list_models():
        name = published_as(name)
    config, folder = config_at(name)
    if config is None:
        config = architecture_of(read_state_dict(resolve_weights(path)), name, classifier=False)
    described = read_description(folder) if folder is not None else {}
    known = {tuple(map(tuple, value)): key for key, value in NORMALIZATION.items()}
    pixels = tuple(tuple(described.get(key) or ()) for key in ("mean", "std"))
    own = {key: described[key] for key in ("channels", "value_range") if described.get(key) is not None}
    if config.in_chans != 3:
        own.setdefault("channels", config.in_chans)
    normalization = known.get(pixels)
    if normalization is None and folder is not None and (folder / "preprocessing.json").is_file():
        normalization = str(folder / "preprocessing.json")
    return WeightsDescription(_model_fields(config, name), normalization, {k: _tuple(v) for k, v in own.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def saved_config(path: str | Path) -> dict[str, Any]:
    """The configuration of a run folder, as JSON has it; empty where it is none."""
    try:
        saved = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    config = saved.get("config") if isinstance(saved, dict) and "task" in saved else None
    return config if isinstance(config, dict) else {}


def _model_fields(config: BeitConfig, source: str) -> dict[str, Any]:
    """The fields of a `ModelConfig` that make this architecture."""
    height, width = config.image_hw
    if config.mlp_ratio != 4.0:
        raise ValueError(f"{source}: a model with MLP ratio {config.mlp_ratio:g}; training knows ratio 4")
    preset: Any = "plain" if config.relative_position_bias == "none" else "plus"
    sizes: tuple[Any, ...] = ("tiny", "small", "base", "large")
    shape = {name: getattr(config, name) for name in ("width", "depth", "num_heads")}
    usual = {size: BeitConfig.from_preset(size, preset) for size in sizes}
    size = next((s for s in sizes if all(getattr(usual[s], n) == v for n, v in shape.items())), None)
    like = usual[size or "base"]
    scaled = config.layer_scale_init is not None
    return {
        "size": size or "base",
        "preset": preset,
        **{name: None if size else value for name, value in shape.items()},
        "patch_size": config.patch_size,
        "use_abs_pos_emb": None if config.use_abs_pos_emb == like.use_abs_pos_emb else config.use_abs_pos_emb,
        "layer_scale_init": None if scaled == (like.layer_scale_init is not None) else 0.1 if scaled else 0.0,
        "image_size": height if height == width else (height, width),
    }


def with_weights(config: Any, typed: set[str]) -> Any:
    """`config` with the architecture, the image size and the normalisation of its `weights`.

    An image size that the recipe sets, or the user, stays: position tables are resized.

    Args:
        config: of a task that has `weights`, `model` and `data`.
        typed: names of the fields that the user set, dotted (`model.size`); they stay as they are.

    Raises:
        ValueError: the weights cannot be read, or fields in `typed` contradict them; all are named.
    """
    there = describe_weights(config.weights)
    model = replace(config.model, **{name: value for name, value in there.model.items() if name in ARCHITECTURE})
    mine = {name: getattr(config.model, name) for name in ARCHITECTURE if f"model.{name}" in typed}
    wrong = []
    if mine and model.architecture(8192) != replace(model, **mine).architecture(8192):
        wrong = [
            f"--model.{name.replace('_', '-')} {value} (there: {there.model.get(name)})"
            for name, value in mine.items()
            if value != there.model.get(name)
        ]
    default_size = next(each.default for each in fields(type(config.model)) if each.name == "image_size")
    kept = "model.image_size" in typed or config.model.image_size != default_size
    data = config.data
    if not hasattr(config, "crops"):  # segmentation: crops and normalisation are its own
        model = model if kept else replace(model, image_size=there.model["image_size"])
        if there.normalization is not None and there.normalization != data.normalization:
            if "data.normalization" in typed:
                wrong.append(f"--data.normalization {data.normalization} (there: {there.normalization})")
            data = replace(data, normalization=there.normalization)
        own = {name: value for name, value in there.data.items() if f"data.{name}" not in typed}
        if data.path is not None and "data.channels" not in typed:  # typed ones fit the weights to other images
            data = replace(data, **own)
    if wrong:
        raise ValueError(f"these options contradict --weights {config.weights}: {', '.join(wrong)}; leave them out")
    return replace(config, model=model, data=data)
