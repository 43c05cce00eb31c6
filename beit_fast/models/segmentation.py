"""BEiT for semantic segmentation: the backbone's feature pyramid under UPerNet, or its maps under SETR-PUP."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from beit_fast.models.backbone import BeitBackbone
from beit_fast.models.checkpoints import load_checkpoint
from beit_fast.models.configs import BeitConfig
from beit_fast.models.heads import FCNHead, SetrUpHead, UPerHead, resize
from beit_fast.models.hub import model_folder, save_folder, tuples
from beit_fast.models.initialisation import init_for_fine_tuning
from beit_fast.models.reading import CheckpointError

SegmentationHead = Literal["upernet", "setr_pup"]


def default_taps(depth: int) -> tuple[int, int, int, int]:
    """Blocks (from 0) after a third, half, two thirds and all of the depth: 3, 5, 7, 11 of 12, 7, 11, 15, 23 of 24."""
    third, half, two_thirds, last = (-(-depth * sixths // 6) - 1 for sixths in (2, 3, 4, 6))
    return third, half, two_thirds, last


@dataclass(frozen=True)
class SegmentationConfig:
    """Architecture of a segmentation model.

    Raises:
        ValueError: a number is not positive, there is no such block or head, or all blocks share one table.
    """

    backbone: BeitConfig
    """The BEiT, as it is fine-tuned; its image size is that of the crops it trains on."""
    num_classes: int = 150
    """Classes of a pixel; 150 in ADE20K."""
    head: SegmentationHead = "upernet"
    """`upernet` (the released models) or `setr_pup` (the paper's tables; its head was not released)."""
    taps: tuple[int, int, int, int] | None = None
    """Blocks (from 0) whose outputs the head reads, the last block last; None: `default_taps`."""
    channels: int | None = None
    """Width of the head; None: that of the backbone for UPerNet (as released), 512 for SETR-PUP."""
    auxiliary_channels: int = 256
    """Width of UPerNet's auxiliary head; those of SETR-PUP have the width of the head."""
    dropout: float = 0.1
    """Share of the channels dropped in front of the last convolution of every head."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """Grids of UPerNet's pyramid pooling."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "head_channels", "auxiliary_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.removeprefix('head_')} must be positive, got {getattr(self, name)}")
        if self.head not in ("upernet", "setr_pup"):
            raise ValueError(f"head {self.head!r} is unknown; choose upernet or setr_pup")
        depth, taps = self.backbone.depth, self.blocks
        if len(taps) != 4 or any(b < a for a, b in pairwise(taps)) or taps[0] < 0:
            raise ValueError(f"taps must be four blocks from 0 on in ascending order, got {taps}")
        if taps[-1] != depth - 1:
            raise ValueError(f"the last tap must be the last block, {depth - 1}, got {taps[-1]}")
        if self.backbone.relative_position_bias == "shared":
            raise ValueError("the backbone shares one table between its blocks; give BeitConfig.for_classification()")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """The blocks that are read."""
        return default_taps(self.backbone.depth) if self.taps is None else self.taps

    @property
    def head_channels(self) -> int:
        """Width of the head."""
        if self.channels is not None:
            return self.channels
        return self.backbone.width if self.head == "upernet" else 512


class SegmentationBackbone(BeitBackbone):
    """A BEiT that gives the outputs of four blocks as maps, for UPerNet at four resolutions.

    No norm follows the blocks. The pyramid is the official one: the first map is upsampled fourfold and the second
    twofold by transposed convolutions, the third stays, the fourth is max-pooled.
    """

    def __init__(self, config: BeitConfig, taps: tuple[int, ...], pyramid: bool) -> None:
        super().__init__(config)
        self.taps = taps
        width = config.width
        self.fpn1 = self.fpn2 = None
        if pyramid:
            self.fpn1 = nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.BatchNorm2d(width),
                nn.GELU(),
                nn.ConvTranspose2d(width, width, 2, stride=2),
            )
            self.fpn2 = nn.Sequential(nn.ConvTranspose2d(width, width, 2, stride=2))
        init_for_fine_tuning(self)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> list[Tensor]:
        """(B, C, S, T) -> four maps (B, D, h, w), which the pyramid takes to 4, 2, 1 and 1/2 times h x w."""
        outputs: list[Tensor] = []
        biases = self._attention_biases(images)
        drop_path = (
            self.drop_path(images.shape[0], sample_keys, images.device)
            if self.training and self.drop_path.rate
            else None
        )
        self._run_blocks(self._embed(images), biases, drop_path, self.layers(), None, outputs)
        grid = self._grid_of(images)
        # Not made contiguous: channels come last in memory, which is how convolutions run fastest.
        maps = [outputs[tap][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]
        return self.pyramid(maps)

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) to their resolutions."""
        if self.fpn1 is None or self.fpn2 is None:
            return maps
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], nn.functional.max_pool2d(maps[3], 2)]


class SegmentationLogits(NamedTuple):
    """What the heads give, each at its own resolution."""

    main: Tensor
    """(B, num_classes, h, w)"""
    auxiliary: tuple[Tensor, ...]
    """Of the auxiliary heads (B, num_classes, h', w'); none in evaluation mode."""


class BeitForSemanticSegmentation(nn.Module):
    """BEiT with a segmentation head (paper, section 3.2; the official segmentation code).

    Names are the official ones: `backbone.*`, `decode_head.*`, `auxiliary_head.*`. Images may have any size that is a
    multiple of the patch (UPerNet: of two patches).
    """

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, classes = config.backbone.width, config.head_channels, config.num_classes
        dropout = config.dropout
        self.backbone = SegmentationBackbone(config.backbone, config.blocks, pyramid=config.head == "upernet")
        self.decode_head: nn.Module
        self.auxiliary_head: nn.Module
        if config.head == "upernet":
            self.decode_head = UPerHead(width, channels, classes, dropout, config.pool_scales)
            self.auxiliary_head = FCNHead(width, config.auxiliary_channels, classes, dropout)
        else:
            self.decode_head = SetrUpHead(width, channels, classes, dropout, num_convs=4, up_scale=2)
            auxiliary = (SetrUpHead(width, channels, classes, dropout, num_convs=2, up_scale=4) for _ in range(3))
            self.auxiliary_head = nn.ModuleList(auxiliary)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Beit.set_grad_checkpointing`."""
        self.backbone.set_grad_checkpointing(enable)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> SegmentationLogits:
        """(B, C, S, T) -> logits at the heads' resolutions; `sample_keys` int64 (B,) decide drop path."""
        maps = self.backbone(images, sample_keys)
        if isinstance(self.auxiliary_head, nn.ModuleList):
            main = self.decode_head(maps[-1])
            if not self.training:
                return SegmentationLogits(main, ())
            pairs = zip(self.auxiliary_head, maps[:-1], strict=True)
            return SegmentationLogits(main, tuple(head(features) for head, features in pairs))
        main = self.decode_head(maps)
        return SegmentationLogits(main, (self.auxiliary_head(maps[2]),) if self.training else ())

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, S, T) -> logits (B, num_classes, S, T) in fp32, at the size of the images."""
        return resize(self(images).main.float(), images.shape[-2:])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into a folder."""
        save_folder(self, asdict(self.config), Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BeitForSemanticSegmentation:
        """The model that `save_pretrained` or a run wrote, in evaluation mode; CheckpointError where it is another."""
        folder = model_folder(folder)
        file = folder / "config.json"
        try:
            values = json.loads(file.read_text())
            if values.pop("model_class") != cls.__name__:
                raise ValueError("it describes another kind of model")
            del values["library_name"], values["library_version"]
            backbone = BeitConfig(**tuples(values.pop("backbone")))
            config = SegmentationConfig(backbone, **tuples(values))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{file}: describes no segmentation model of beit_fast ({error})") from error
        model = cls(config)
        load_checkpoint(model, folder, verbose=False)
        return model.eval()


def segmentation_config(backbone: BeitConfig, num_classes: int, **values: Any) -> SegmentationConfig:
    """The configuration of a segmentation model on `backbone`, which may be that of pre-training."""
    per_block = replace(backbone.for_classification(0), layer_scale_init=backbone.layer_scale_init or None)
    return SegmentationConfig(per_block, num_classes, **values)


def segmentation_loss(logits: SegmentationLogits, labels: Tensor, ignore: int, auxiliary_weight: float) -> Tensor:
    """Sum over pixels of the cross-entropy at the labels' resolution, plus that of the auxiliary heads, weighted.

    Ignored pixels count zero, so a crop of nothing else has loss 0. `labels` int64 (B, S, T).
    """

    def summed(scores: Tensor) -> Tensor:
        full = resize(scores.float(), labels.shape[-2:])
        return nn.functional.cross_entropy(full, labels, ignore_index=ignore, reduction="sum")

    total = summed(logits.main)
    for scores in logits.auxiliary:
        total = total + auxiliary_weight * summed(scores)
    return total
