"""Open a segmentation model from any checkpoint: the model, its classes, and how images are shown to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from beit_fast.data.loader import NORMALIZATION
from beit_fast.models import BeitForSemanticSegmentation, CheckpointError, SegmentationConfig, load_checkpoint
from beit_fast.models.key_names import to_official
from beit_fast.models.reading import read_state_dict
from beit_fast.train.evaluation.classifiers import architecture_of, local_source, read_description
from beit_fast.train.evaluation.segmentation import Inference


@dataclass(frozen=True)
class Segmentor:
    """A model in evaluation mode and what it expects."""

    model: BeitForSemanticSegmentation
    classes: tuple[str, ...]
    """Names of its outputs; numbers where the file has no names."""
    inference: Inference


def open_segmentor(path: str | Path) -> Segmentor:
    """The model of a segmentation run, or of a file or folder of the official code, mmsegmentation or transformers.

    Of such a file the architecture is read off its tensors; its images are scaled as officially (short side of a
    window's length, normalised by ImageNet's mean and standard deviation).

    Raises:
        CheckpointError: (a ValueError) it cannot be read, or holds no segmentation model for square crops.
    """
    root = local_source(path)
    if (root / "model" / "preprocessing.json").is_file():
        root = root / "model"
    elif (root / "checkpoints").is_dir():
        raise CheckpointError(f"{root}: this run has not finished and left no model; name a file of weights")
    described = read_description(root) if root.is_dir() else {}
    if "stride" in described:
        model = BeitForSemanticSegmentation.from_pretrained(root)
    else:
        model = BeitForSemanticSegmentation(segmentor_of(root))
        load_checkpoint(model, root)
        model.eval()
    height, width = model.config.backbone.image_hw
    if height != width:
        raise CheckpointError(f"{root}: its crops are {height} x {width} pixels; only square windows slide over images")
    names = described.get("classes") or [str(number) for number in range(model.config.num_classes)]
    mean, std = NORMALIZATION["imagenet"]
    inference = Inference(
        tuple(described.get("mean", mean)), tuple(described.get("std", std)), height,
        described.get("stride", max(height * 2 // 3, 1)), tuple(described.get("base", (4 * height, height))),
    )  # fmt: skip
    return Segmentor(model, tuple(names), inference)


def is_segmentor(path: str | Path) -> bool:
    """Whether a run, a folder or a file holds a segmentation model; False too where it cannot be read."""
    root = local_source(path)
    root = root / "model" if (root / "model" / "config.json").is_file() else root
    if root.is_dir() and "stride" in read_description(root):
        return True
    try:
        tensors, _ = to_official(read_state_dict(root))
    except ValueError:
        return False
    return any(name.startswith("decode_head.") for name in tensors)


def segmentor_of(path: Path) -> SegmentationConfig:
    """The configuration of a segmentation model, from the shapes of a file's tensors."""
    state = read_state_dict(path)
    config = architecture_of(state, str(path), classifier=False)
    tensors, _ = to_official(state)
    if "decode_head.conv_seg.weight" not in tensors:
        raise CheckpointError(f"{path}: holds no segmentation head (no decode_head.conv_seg.weight); train one first")
    classes, channels = tensors["decode_head.conv_seg.weight"].shape[:2]
    auxiliary = tensors.get("auxiliary_head.conv_seg.weight")
    return SegmentationConfig(
        config.for_classification(0, global_pool="avg"), classes, channels=channels,
        head="upernet" if "decode_head.bottleneck.conv.weight" in tensors else "setr_pup",
        auxiliary_channels=256 if auxiliary is None else auxiliary.shape[1],
    )  # fmt: skip
