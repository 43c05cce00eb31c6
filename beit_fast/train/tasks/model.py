"""The BEiT of a run, the patches it hides and what it predicts there: options, and what a forward pass takes."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from beit_fast.data.resizing import height_width
from beit_fast.data.sampling import BlockwiseMasking
from beit_fast.models import BeitConfig
from beit_fast.models.configs import Preset, Size
from beit_fast.train.config import free, local


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The BEiT to train."""

    size: Size = "base"
    """Width, depth and heads."""
    preset: Preset = "plus"
    """`plus`: LayerScale and a shared relative position bias (the released weights; paper, appendix A). `plain`:
    absolute position embedding only (the paper's main tables)."""
    image_size: int | tuple[int, int] = 224
    """Side of the model's view in pixels, or its height and width."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block; linear from 0 at the first."""
    width: int | None = None
    """In place of the size's token width."""
    depth: int | None = None
    """In place of the size's number of blocks."""
    num_heads: int | None = None
    """In place of the size's number of heads."""
    use_abs_pos_emb: bool | None = None
    """In place of the preset's choice of an absolute position embedding."""
    layer_scale_init: float | None = None
    """In place of the preset's LayerScale start value; 0 leaves LayerScale out."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    grad_checkpointing: bool = free(False)
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @property
    def view(self) -> tuple[int, int]:
        """Height and width of the model's view in pixels."""
        return height_width(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.view[0] // self.patch_size, self.view[1] // self.patch_size

    def architecture(self, vocab_size: int, **more: Any) -> BeitConfig:
        """The model's configuration for a tokenizer with `vocab_size` tokens; ValueError where it cannot be."""
        for name in ("width", "depth", "num_heads", "use_abs_pos_emb"):
            if getattr(self, name) is not None:
                more[name] = getattr(self, name)
        if self.layer_scale_init is not None:
            more["layer_scale_init"] = self.layer_scale_init or None
        return BeitConfig.from_preset(
            self.size, self.preset, image_size=self.image_size, patch_size=self.patch_size, vocab_size=vocab_size,
            drop_path_rate=self.drop_path_rate, init_std=self.init_std, **more,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which patches are hidden (paper, section 2.3 and algorithm 1)."""

    num_masked: int | None = 75
    """Masked patches per image; about 40 % in the paper. None: as many of any grid, 75 of 14 x 14."""
    mode: Literal["exact", "official", "random", "none"] = "exact"
    """`exact`: blockwise, always `num_masked`. `official`: blockwise, stops a patch or two short in a third of the
    images. Ablations of table 4: `random`, without blocks; `none` hides nothing, which needs --objective.recover all.
    """
    min_num_patches: int = 16
    """Smallest block, in patches; at most a quarter of the masked ones where their number follows the grid."""
    min_aspect: float = 0.3
    """Smallest ratio of a block's sides; the largest is its inverse."""

    def of(self, grid: tuple[int, int]) -> BlockwiseMasking:
        """The masks of a grid of patches (down, across)."""
        count, smallest = self.num_masked, self.min_num_patches
        if count is None:
            count = max(1, round(grid[0] * grid[1] * 75 / 196))
            smallest = min(smallest, max(1, count // 4))
        return BlockwiseMasking(grid, count, self.mode, smallest, None, self.min_aspect)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is predicted where; all but the defaults are ablations of table 4."""

    target: Literal["visual_tokens", "pixels"] = "visual_tokens"
    """`pixels`: regress the normalised pixels of patches by their mean squared error, without a tokenizer."""
    recover: Literal["masked", "all"] = "masked"
    """`all`: predict visible patches as well as hidden ones."""
    head_layers: int = 0
    """Extra blocks of BEiT v2's second head, which predicts the tokens from CLS and early patch tokens; 2 in the paper.
    They are not part of the model that is fine-tuned."""
    early_layers: int = 0
    """Blocks after which that head takes the patch tokens: 9 of the 12 of a base model, 21 of the 24 of a large one."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What turns images into visual tokens (paper, section 2.1)."""

    name: str = local("dalle", free=False)
    """`dalle`: OpenAI's dVAE, as in the paper (fetched at first use, or put there by hand). `vqkd`: BEiT v2's,
    likewise. `demo`: the small one that comes along. Or a file: encoder.pkl, .safetensors, .pth, .bin."""
    sha256: str | None = None
    """Demand this hash of the file that is read; of encoder and decoder, separated by a comma, to read both."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of its convolutions, all but the output one, which is fp32 always. `auto`: fp32 on the CPU, fp16 on a GPU, as the
    official code runs DALL-E's. Rounding moves a token where two are nearly equally probable; bf16 moves more of them
    (of the demo tokenizer's on built-in images, 1.2 %)."""

    def dtype(self, device: torch.device) -> torch.dtype:
        """What `precision` is on this device."""
        return half_on_gpu(self.precision, device)


def half_on_gpu(precision: str, device: torch.device) -> torch.dtype:
    """The type that the name of a frozen network's precision stands for; `auto` is fp32 on the CPU, else fp16."""
    name = ("fp32" if device.type == "cpu" else "fp16") if precision == "auto" else precision
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def multiply_adds(config: BeitConfig, num_masked: int | None = None) -> float:
    """Multiply-adds of one image's forward pass: patches, blocks on all tokens, and the head.

    18.03e9 for BEiT-B with its head on `num_masked` = 75 patches, 17.56e9 as a classifier at 224 pixels. What this
    implementation saves in the last block is not subtracted, so that throughputs compare with others'.
    """
    n, d = config.num_patches + 1, config.width
    pixels = config.in_chans * config.patch_size**2
    block = (4 + 2 * config.mlp_ratio) * n * d * d + 2 * n * n * d
    outputs = config.vocab_size if config.mim_target == "visual_tokens" else pixels
    head = d * config.num_classes if num_masked is None else num_masked * d * outputs
    heads = 2 if config.head_layers else 1
    return config.num_patches * d * pixels + (config.depth + config.head_layers) * block + heads * head
