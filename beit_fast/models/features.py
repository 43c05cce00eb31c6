"""A BEiT as a backbone that gives feature maps: what `create_model(..., features_only=True)` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from beit_fast.models.beit import Beit, take_indices


class FeatureInfo:
    """Channels, strides and module names of the feature maps, with timm's methods."""

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = [{**entry, "index": index} for index, entry in enumerate(info)]
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        return [self.info[i]["num_chs"] for i in self.out_indices]

    def reduction(self) -> list[int]:
        """Pixels of the image per step of the map."""
        return [self.info[i]["reduction"] for i in self.out_indices]

    def module_name(self) -> list[str]:
        return [self.info[i]["module"] for i in self.out_indices]

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All of each map's entries, or those named."""
        taken = [self.info[i] for i in self.out_indices]
        return taken if keys is None else [{key: entry[key] for key in keys} for entry in taken]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class BeitFeatures(nn.Module):
    """The blocks of a `Beit` up to the last of `out_indices`, whose outputs it gives as maps.

    Args:
        model: loses its head and the blocks that are not needed.
        out_indices: block numbers from 0, those of the official code (3, 5, 7, 11 for a base model's segmentation); or
            n for the last n blocks. transformers' `BeitBackbone` counts them from 1, its stage 0 being the embedding:
            its `out_indices=[4, 6, 8, 12]` are these.
        norm: apply the model's final `norm`, where it has one, to each map.
        output_fmt: "NCHW" for (B, D, h, w), "NLC" for (B, N-1, D).
    """

    def __init__(
        self, model: Beit, out_indices: int | Sequence[int] = 3, norm: bool = False, output_fmt: str = "NCHW"
    ) -> None:
        super().__init__()
        indices = take_indices(len(model.blocks), out_indices)
        self.feature_info = FeatureInfo(model.feature_info, indices)
        model.prune_intermediate_layers(indices, prune_norm=not norm)
        self.model = model
        self.norm, self.output_fmt = norm, output_fmt

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's description of the weights, as of the `Beit` it was made of."""
        return self.model.default_cfg

    pretrained_cfg = default_cfg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Beit.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, S, S) -> a map (B, D, h, w) for each of `out_indices`, in ascending order."""
        return self.model.forward_intermediates(
            images,
            indices=self.feature_info.out_indices,
            norm=self.norm,
            output_fmt=self.output_fmt,
            intermediates_only=True,
        )
