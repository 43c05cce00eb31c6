"""`beit-fast export`: a model as files of another library, refused where its outputs differ."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

from beit_fast.cli.options import errors_in_one_line, fail, parse
from beit_fast.cli.predict import read_view
from beit_fast.data import builtin
from beit_fast.data.arrays.statistics import normalization_of
from beit_fast.integrations.export import Target, export
from beit_fast.models import BeitForMaskedImageModeling, CheckpointError
from beit_fast.train.evaluation.classifiers import open_classifier
from beit_fast.train.evaluation.segmentors import open_segmentor

LIMIT = 1e-4
"""Largest difference of an output that is rounding, as a share of the largest output."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a model as files of another library, open them, and compare the outputs on photographs.

    beit-fast export runs/finetune_imagenet_base exported --to timm
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")] = ""
    """A run, or a file or folder of weights (this library, the official code, timm, transformers)."""
    output: Annotated[Positional[Path | None], arg(metavar="OUTPUT")] = None
    """The folder to write; it must not exist yet."""
    to: Target = "safetensors"
    """timm: a folder for timm.create_model("local-dir:FOLDER"). transformers: for from_pretrained(FOLDER). onnx:
    model.onnx. torch-export: model.pt2 for torch.export.load. safetensors: a folder of this library."""


def export_command(arguments: Sequence[str]) -> int:
    """Export, compare, and print the largest difference; 1 where it is more than rounding."""
    chosen = parse(ExportOptions(), arguments, "beit-fast export")
    if chosen.output is None:
        fail("export takes a model and a folder: beit-fast export RUN FOLDER --to timm", code=2)
    with errors_in_one_line():
        if chosen.output.exists():
            raise ValueError(f"{chosen.output} exists already; name a folder that does not")
        model, preprocessing = open_any(chosen.model)
        images = photographs(model.config, preprocessing)
        work = chosen.output.with_name(f".{chosen.output.name}.unchecked")
        shutil.rmtree(work, ignore_errors=True)
        try:
            difference, largest = compared(model, chosen.to, work, images, preprocessing)
            line = f"largest difference {difference:.1e} of outputs up to {largest:.3g} on {len(images)} photographs"
            if not difference <= LIMIT * largest:
                raise ValueError(f"{chosen.to} gives other outputs than {chosen.model}: {line}; nothing was written")
            work.rename(chosen.output)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{line}\nwrote {chosen.output}")
    return 0


def compared(
    model: nn.Module, to: Target, folder: Path, images: Tensor, preprocessing: Mapping[str, Any]
) -> tuple[float, float]:
    """Export into `folder`; the largest difference of the outputs there and here, and the largest output."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what exporters say to each other
        ours, theirs = export(model, to, folder, images[:2], preprocessing)
        expected, found = ours(images), theirs(images)
    return float((found - expected).abs().max()), float(expected.abs().max())


def open_any(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model from any supported checkpoint, in evaluation mode on the CPU, and the preprocessing of its images.

    ValueError where it is no classifier, segmentation model or pre-training run.
    """
    folder = Path(source) / "model" if (Path(source) / "model" / "config.json").is_file() else Path(source)
    kind = _values(folder / "config.json").get("model_class")
    described = _values(folder / "preprocessing.json")
    if kind == "BeitForMaskedImageModeling":
        return BeitForMaskedImageModeling.from_pretrained(folder), described
    if kind == "BeitForSemanticSegmentation":
        return open_segmentor(source).model, described
    try:
        classifier = open_classifier(source)
    except CheckpointError as error:
        if "decode_head" not in str(error):
            raise
        return open_segmentor(source).model, described
    values = {"mean": classifier.mean, "std": classifier.std, "crop_share": classifier.crop_share,
              "channels": classifier.channels, "value_range": classifier.value_range}  # fmt: skip
    return classifier.model, {**described, **values, "classes": classifier.classes}


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def photographs(config: Any, preprocessing: Mapping[str, Any]) -> Tensor:
    """The photographs that come along, (7, C, H, W), normalised as the model expects."""
    backbone = getattr(config, "backbone", config)
    channels = backbone.in_chans
    mean, std = (
        torch.tensor(preprocessing.get(name) or default)[:, None, None]
        for name, default in zip(("mean", "std"), normalization_of("half", channels), strict=True)
    )
    views = [
        read_view(path, backbone.image_hw, 1.0)
        for path in sorted(Path(builtin.__file__).with_name("photographs").glob("*.jpg"))
    ]
    order = [channel % 3 for channel in range(channels)]  # of other channels: the colours in turn
    return torch.stack([(view[order] - mean) / std for view in views if isinstance(view, Tensor)])
