"""Sliding-window segmentation of one image: beit_fast beside transformers' model in the same windows.

    pytest benchmarks/bench_segmentation.py --benchmark-only

BEiT-B with UPerNet and 150 classes at random weights, the same for all, on an image with sides 3 to 4 whose short side
is the window's, officially scaled: two windows of 512 (stride 341) or 640 (stride 426). Every row has the peak memory.
transformers' model reads the official blocks here; one window after the other is how its users slide.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import use_backend
from beit_fast.models import BeitConfig, BeitForSemanticSegmentation, convert_state_dict
from beit_fast.models.segmentation import segmentation_config
from beit_fast.models.segmentation_windows import sliding_logits, window_starts
from beit_fast.train.tasks.model import multiply_adds
from beit_fast.train.tasks.segment import head_flops
from benchmarks.baselines.libraries import transformers_beit
from benchmarks.harness import OURS, Comparison, Implementation

ONE = "beit_fast, one window at a time"
NAMES = [OURS, ONE, "transformers, one window at a time"]


@dataclass(frozen=True)
class Case:
    side: int
    device: torch.device
    dtype: torch.dtype
    overrides: tuple[tuple[str, Any], ...] = ()
    classes: int = 150


def cases(scale: Any) -> dict[str, Case]:
    sides = scale.pick(tiny=(32,), cpu=(128,), gpu=(512, 640), full=(512, 640))
    tiny = (("width", 16), ("depth", 6), ("num_heads", 2), ("patch_size", 8)) if scale.name == "tiny" else ()
    return {
        f"{side} px": Case(side, scale.device, getattr(torch, scale.dtype), tiny, 5 if tiny else 150) for side in sides
    }


def compare(case: Case) -> Comparison:
    device, side = case.device, case.side
    config = segmentation_config(BeitConfig.from_preset("base", image_size=side, **dict(case.overrides)), case.classes)
    torch.manual_seed(0)
    model = BeitForSemanticSegmentation(config).to(device).eval()
    with torch.no_grad():  # logits that differ from place to place, as those of a trained model
        model.decode_head.conv_seg.weight.normal_()  # type: ignore[union-attr,operator]
    width, stride = side * 4 // 3, side * 2 // 3
    image = torch.randn(3, side, width, generator=torch.Generator().manual_seed(1)).to(device)
    windows = len(window_starts(width, side, stride))

    def sliding(predict: Any, batch_size: int) -> Implementation:
        def run() -> Tensor:
            with torch.no_grad(), torch.autocast(device.type, case.dtype, enabled=case.dtype != torch.float32):
                return sliding_logits(predict, image, side, stride, batch_size)

        return Implementation(run, lambda: {"logits": run()}, info={"windows": windows})

    def exact() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Our model from plain operations, in fp64 and in the dtype of the case."""
        with use_backend("reference"):
            wide = copy.deepcopy(model).double()
            with torch.no_grad():
                logits = sliding_logits(wide.predict, image.double(), side, stride, 8)
            return {"logits": logits}, {"logits": sliding(model.predict, 8).run()}

    def transformers() -> Implementation:
        theirs = transformers_beit(
            replace(config.backbone, num_classes=case.classes), "BeitForSemanticSegmentation",
            out_indices=[1, 2, 3, 4], auxiliary_channels=config.auxiliary_channels
        )  # fmt: skip
        theirs.config._out_indices = [tap + 2 for tap in config.blocks]
        theirs.load_state_dict(convert_state_dict(model.state_dict(), to="transformers"))
        theirs.to(device).eval()

        def predict(images: Tensor) -> Tensor:
            logits = theirs(images).logits.float()
            return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

        return sliding(predict, 1)

    return Comparison(
        group=f"segmentation: BEiT-B, UPerNet, {windows} windows of {side} in {side} x {width}",
        implementations={
            OURS: lambda: sliding(model.predict, 8),
            ONE: lambda: sliding(model.predict, 1),
            NAMES[2]: transformers,
        },
        shapes={"image": (side, width), "window": side, "stride": stride, "classes": case.classes},
        dtype=str(case.dtype).removeprefix("torch."),
        flops=windows * (2.0 * multiply_adds(config.backbone) + head_flops(config, training=False)),
        images=1,
        exact=None if case.dtype == torch.float32 else exact,
    )


@pytest.mark.parametrize("name", NAMES)
def test_sliding_windows(interleaved, case, name):
    interleaved(case, lambda: compare(case), name, 30.0)
