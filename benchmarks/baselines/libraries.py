"""What beit_fast is measured beside: other libraries, and straight ports where no library has the job."""

import inspect
import math
import random
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beit_fast import BeitConfig
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from benchmarks.harness import Unavailable


class RandomNumbers(Protocol):
    """The two draws of Python's `random` that the sampler takes."""

    def uniform(self, a: float, b: float, /) -> float: ...
    def randint(self, a: int, b: int, /) -> int: ...


class PythonBlockwiseMasking:
    """BEiT's blockwise mask sampler (paper, algorithm 1, as the official code runs it) in plain Python and numpy.

    One mask per call, as a data loader's transform: what `beit_fast.data.BlockwiseMasking` is compared with, and the
    oracle of its statistics in mode `official`. An area bound may exceed the patches left; `uniform` then has its
    bounds swapped.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_masked: int,
        min_num_patches: int = 16,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        rng: RandomNumbers | None = None,
    ) -> None:
        self.height, self.width = grid
        self.num_masked = num_masked
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masked if max_num_patches is None else max_num_patches
        self.log_aspect = (math.log(min_aspect), math.log(1 / min_aspect))
        self.rng: RandomNumbers = random.Random(0) if rng is None else rng

    def __call__(self) -> NDArray[np.int64]:
        """Returns a mask (h, w) of 0 and 1."""
        mask = np.zeros((self.height, self.width), dtype=np.int64)
        count = 0
        while count < self.num_masked:
            gained = self._place_block(mask, min(self.num_masked - count, self.max_num_patches))
            if gained == 0:
                break
            count += gained
        return mask

    def _place_block(self, mask: NDArray[np.int64], most: int) -> int:
        for _ in range(10):
            area = self.rng.uniform(self.min_num_patches, most)
            aspect = math.exp(self.rng.uniform(*self.log_aspect))
            rows = round(math.sqrt(area * aspect))
            columns = round(math.sqrt(area / aspect))
            if columns >= self.width or rows >= self.height:
                continue
            top = self.rng.randint(0, self.height - rows)
            left = self.rng.randint(0, self.width - columns)
            block = mask[top : top + rows, left : left + columns]
            gained = rows * columns - int(block.sum())
            if 0 < gained <= most:
                block[:] = 1
                return gained
        return 0


def timm_beit(config: BeitConfig, **overrides: Any) -> Any:
    """timm's `Beit` of the same architecture, its weights at random."""
    make_torchvision_importable()
    import timm
    from timm.models.beit import Beit

    values: dict[str, Any] = {
        "img_size": config.image_hw,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "num_classes": config.num_classes,
        "global_pool": config.global_pool,
        "use_fc_norm": config.use_fc_norm,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "init_values": config.layer_scale_init,
        "use_abs_pos_emb": config.use_abs_pos_emb,
        "use_rel_pos_bias": config.relative_position_bias == "per_block",
        "use_shared_rel_pos_bias": config.relative_position_bias == "shared",
        "drop_path_rate": config.drop_path_rate,
    }
    values |= overrides
    known = inspect.signature(Beit).parameters
    if "use_fc_norm" not in known and values["use_fc_norm"] in (None, values["global_pool"] == "avg"):
        del values["use_fc_norm"]  # versions without it decide so themselves
    if unknown := [name for name in values if name not in known]:
        raise Unavailable(f"timm {timm.__version__} has no {unknown[0]}")
    return Beit(**values)


def transformers_beit(config: BeitConfig, kind: str, **overrides: Any) -> Any:
    """transformers' model of that class and of the same architecture, epsilon included, its weights at random."""
    make_torchvision_importable()
    import transformers

    values: dict[str, Any] = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "num_labels": config.num_classes,
        "use_mean_pooling": config.global_pool == "avg",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "layer_norm_eps": config.layer_norm_eps,
        "layer_scale_init_value": config.layer_scale_init or 0.0,
        "use_mask_token": kind == "BeitForMaskedImageModeling",
        "use_absolute_position_embeddings": config.use_abs_pos_emb,
        "use_relative_position_bias": config.relative_position_bias == "per_block",
        "use_shared_relative_position_bias": config.relative_position_bias == "shared",
        "drop_path_rate": config.drop_path_rate,
        "vocab_size": config.vocab_size,
    }
    return getattr(transformers, kind)(transformers.BeitConfig(**{**values, **overrides}))
