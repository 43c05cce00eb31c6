"""Published results of BEiT by name, which `beit-fast verify` compares with. Tables are those of arXiv:2106.08254."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["classifier", "segmentation", "tokenizer", "probe"]
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class Published:
    """A published result."""

    kind: Kind
    metrics: dict[str, float]
    """By the names that this library's evaluations have."""
    source: str
    """Where it is published."""
    weights: str | None = None
    """Released weights that are fetched by this name; None where there are none, or none that can be fetched."""
    image_size: int = 224
    normalization: Literal["imagenet", "half"] = "imagenet"
    multi_scale: bool = False


def _released(size: str, side: int, top1: float, top5: float, tag: str, table: str, timm: bool = True) -> Published:
    name = f"beit_{size}_patch16_{side}.{tag}"
    return Published(
        "classifier", {"top1_percent": top1, "top5_percent": top5}, f"{table}; the official README",
        name if timm else None, side, "half",
    )  # fmt: skip


def _own(top1: float, table: str, side: int = 224) -> Published:
    return Published("classifier", {"top1_percent": top1}, table, None, side)


def _ade(iou: float, table: str, multi_scale: bool = False, side: int = 512) -> Published:
    return Published("segmentation", {"mean_iou_percent": iou}, table, None, side, multi_scale=multi_scale)


_22K = "in22k_ft_in22k_in1k"
_MICROSOFT = "hf-hub:microsoft/beit-{}-finetuned-ade-640-640"

PUBLISHED: dict[str, Published] = {
    # released weights: ImageNet-22k, with intermediate fine-tuning there, and without
    "beit_base_patch16_224_pt22k_ft22kto1k": _released("base", 224, 85.2, 97.6, _22K, "table 6"),
    "beit_base_patch16_384_pt22k_ft22kto1k": _released("base", 384, 86.820, 98.124, _22K, "table 6"),
    "beit_large_patch16_224_pt22k_ft22kto1k": _released("large", 224, 87.396, 98.282, _22K, "table 6"),
    "beit_large_patch16_384_pt22k_ft22kto1k": _released("large", 384, 88.408, 98.602, _22K, "table 6"),
    "beit_large_patch16_512_pt22k_ft22kto1k": _released("large", 512, 88.600, 98.658, _22K, "table 6"),
    "beit_base_patch16_224_pt22k_ft1k": _released("base", 224, 83.7, 96.6, "", "table 6", timm=False),
    "beit_large_patch16_224_pt22k_ft1k": _released("large", 224, 86.0, 97.6, "", "table 6", timm=False),
    "beit_large_patch16_384_in_house_70m": _own(89.3, "table 6, pre-trained on 70M images of its authors", 384),
    "beit_large_patch16_512_in_house_70m": _own(89.5, "table 6, pre-trained on 70M images of its authors", 512),
    # ImageNet-1k alone, preset plain, 800 epochs
    "beit_base_patch16_224_in1k": _own(83.2, "table 1"),
    "beit_base_patch16_384_in1k": _own(84.6, "table 1", 384),
    "beit_large_patch16_224_in1k": _own(85.2, "table 1"),
    "beit_large_patch16_384_in1k": _own(86.3, "table 1", 384),
    # ablations, BEiT-B, 300 epochs
    "ablation_300_epochs": _own(82.86, "table 4"),
    "ablation_random_masking": _own(82.77, "table 4: no blockwise masking"),
    "ablation_pixels": _own(81.04, "table 4: no visual tokens"),
    "ablation_pixels_random_masking": _own(80.50, "table 4: neither visual tokens nor blockwise masking"),
    "ablation_recover_all": _own(82.59, "table 4: recover all tokens"),
    "ablation_no_masking": _own(81.67, "table 4: no masking, recover all tokens"),
    "ablation_800_epochs": _own(83.19, "table 4"),
    "architecture_layer_scale": _own(83.00, "table 5"),
    "architecture_plus": _own(83.22, "table 5: LayerScale and relative position bias"),
    "tokenizer_retrained": _own(82.70, "table 8: a tokenizer trained on ImageNet-1k"),
    "multi_task_dino": _own(82.9, "table 10"),
    # other data
    "cifar100_base": _own(90.1, "table 11"),
    "cifar100_base_intermediate": _own(91.8, "table 11: after fine-tuning on ImageNet-1k"),
    "linear_probe_base": Published("probe", {"best_top1_percent": 56.7, "best_layer": 9}, "table 9"),
    "linear_probe_large": Published("probe", {"best_top1_percent": 73.5, "best_layer": 14}, "table 9"),
    # ADE20K
    "ade20k_base_setr": _ade(45.6, "table 3, SETR-PUP"),
    "ade20k_base_setr_intermediate": _ade(47.7, "table 3, SETR-PUP, after fine-tuning on ImageNet-1k"),
    "ade20k_ablation_300_epochs": _ade(44.65, "table 4"),
    "ade20k_ablation_random_masking": _ade(42.93, "table 4: no blockwise masking"),
    "ade20k_ablation_pixels": _ade(41.38, "table 4: no visual tokens"),
    "ade20k_ablation_pixels_random_masking": _ade(37.09, "table 4: neither visual tokens nor blockwise masking"),
    "ade20k_ablation_recover_all": _ade(40.93, "table 4: recover all tokens"),
    "ade20k_ablation_no_masking": _ade(36.73, "table 4: no masking, recover all tokens"),
    "ade20k_ablation_800_epochs": _ade(45.58, "table 4"),
    "ade20k_architecture_plain": _ade(44.86, "table 5, UPerNet"),
    "ade20k_architecture_layer_scale": _ade(45.43, "table 5, UPerNet"),
    "ade20k_architecture_plus": _ade(45.70, "table 5, UPerNet"),
    "ade20k_multi_task_dino": _ade(46.85, "table 10"),
    "upernet_beit_base_640": Published(
        "segmentation", {"mean_iou_percent": 53.61, "mean_accuracy_percent": 64.82, "pixel_accuracy_percent": 84.62},
        "table 7; the official README", _MICROSOFT.format("base"), 640,
    ),
    "upernet_beit_base_640_ms": Published(
        "segmentation", {"mean_iou_percent": 54.26, "mean_accuracy_percent": 65.28, "pixel_accuracy_percent": 84.9},
        "table 7; the official README", _MICROSOFT.format("base"), 640, multi_scale=True,
    ),
    "upernet_beit_large_640": Published(
        "segmentation", {"mean_iou_percent": 56.7}, "table 7", _MICROSOFT.format("large"), 640
    ),
    "upernet_beit_large_640_ms": Published(
        "segmentation", {"mean_iou_percent": 57.0}, "table 7", _MICROSOFT.format("large"), 640, multi_scale=True
    ),
    "upernet_beit_large_640_in_house_70m": _ade(57.9, "table 7, pre-trained on 70M images of its authors", side=640),
    "upernet_beit_large_640_in_house_70m_ms": _ade(
        58.4, "table 7, pre-trained on 70M images of its authors", True, 640
    ),
    # tokenizers; images and resolution of these errors are not stated
    "dalle": Published("tokenizer", {"mae": 0.0856}, "table 8", "dalle", 112),
    "dalle_retrained": Published("tokenizer", {"mae": 0.0880}, "table 8: trained on ImageNet-1k", None, 112),
}  # fmt: skip
"""By name; those of released files are the files' own."""
