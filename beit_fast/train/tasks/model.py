"""The BEiT of a run: its options, and what a forward pass takes."""

from dataclasses import dataclass
from typing import Any

from beit_fast.models import BeitConfig
from beit_fast.models.configs import Preset, Size
from beit_fast.train.config import free


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The BEiT to train."""

    size: Size = "base"
    """Width, depth and heads."""
    preset: Preset = "plus"
    """`plus`: LayerScale and a shared relative position bias (the released weights; paper, appendix A). `plain`:
    absolute position embedding only (the paper's main tables)."""
    image_size: int = 224
    """Side of the model's view in pixels."""
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
    return config.num_patches * d * pixels + config.depth * block + head
