"""What a patch attends to, head by head: the pictures of the paper's figure 2 and of its official script.

The attention of one block is computed openly, all others run on the fused kernels (`attention_probabilities`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from beit_fast.models.backbone import BeitBackbone
from beit_fast.visualize import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

MASS = 0.6
"""Share of a head's attention that its mask keeps, as in the official script."""
_BRIGHTEST = 0.98
"""Quantile of a map that is drawn in the brightest colour: one patch alone must not darken all others."""


class AttentionMaps(NamedTuple):
    """Attention from one patch of one image to all patches."""

    maps: Tensor
    """(H, h, w) float32; what each head gives to each patch. CLS is left out, so a map sums to at most 1."""
    masks: Tensor
    """bool (H, h, w): the patches with the largest attention, together `MASS` of the map."""
    query: tuple[int, int]
    """Row and column of the patch that attends."""


def attention_maps(
    model: BeitBackbone, image: Tensor, query: tuple[int, int] | None = None, block: int = -1, mass: float = MASS
) -> AttentionMaps:
    """Compute the maps of one patch of an image in one block.

    Args:
        image: (C, S, S), normalised; any multiple of the patch size, position parameters are resized.
        query: row and column of the patch; None: the middle one.
        block: its number, negative from the end.
        mass: share of a map that its mask keeps.

    Raises:
        ValueError: there is no such patch or block, or `mass` is not in (0, 1].
    """
    patch = model.config.patch_size
    height, width = image.shape[-2] // patch, image.shape[-1] // patch
    row, column = (height // 2, width // 2) if query is None else query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"patch ({row}, {column}) lies outside the grid of {height} x {width} patches")
    token = torch.tensor([1 + row * width + column], device=image.device)
    rows = model.attention_probabilities(image[None], block, token)[0, :, 0, 1:]  # (H, N)
    masks = top_mass(rows, mass)
    return AttentionMaps(rows.unflatten(1, (height, width)), masks.unflatten(1, (height, width)), (row, column))


def top_mass(values: Tensor, mass: float) -> Tensor:
    """Mark, in each row of `values` (H, N), the largest entries, as few as make up `mass` of its sum."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    ordered, order = values.double().sort(dim=1, descending=True)
    before = ordered.cumsum(1) - ordered  # the sum of the larger entries
    kept = before < mass * ordered.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def attention_sheet(image: Tensor, attention: AttentionMaps) -> Image:
    """Draw the image with the query patch marked, each head's map, and below each map the image that its mask keeps.

    Args:
        image: (3, S, S) in [0, 1], not normalised, whose patches the maps are of.
        attention: of the same image.
    """
    maps, kept = _pictures(image, attention)
    ranges = [_range(values) for values in attention.maps]
    names = [f"head {n}\n{100 * low:.2g} to {100 * high:.2g} %" for n, (low, high) in enumerate(ranges)]
    scale = pictures.colour_scale("smallest of the head", f"{100 * _BRIGHTEST:.0f}th percentile and above")
    marked = _marked(image, attention)
    return pictures.sheet([[marked, *maps], [image, *kept]], ["query patch", *names], legend=scale)


def save_attention(folder: Path, image: Tensor, attention: AttentionMaps) -> list[Path]:
    """Write what the official script does: img.png, select.png, attn-head{j}.png and mask_th0.6_head{j}.png."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"img.png": image, "select.png": _marked(image, attention)}
    for number, (values, kept) in enumerate(zip(*_pictures(image, attention), strict=True)):
        named |= {f"attn-head{number}.png": values, f"mask_th{MASS}_head{number}.png": kept}
    for name, pixels in named.items():
        pictures.to_pil(pixels).save(folder / name)
    return [folder / name for name in named]


def _pictures(image: Tensor, attention: AttentionMaps) -> tuple[list[Tensor], list[Tensor]]:
    """Heat map of each head, and the image where its mask is true."""
    patch = image.shape[-1] // attention.maps.shape[-1]
    maps = []
    for values in attention.maps:
        low, high = _range(values)
        maps.append(pictures.heat((values - low) / max(high - low, 1e-12), patch))
    masks = pictures.enlarged(attention.masks, patch)
    return maps, [torch.where(mask, image, 0.25 * image + 0.75 * pictures.GREY) for mask in masks]


def _range(values: Tensor) -> tuple[float, float]:
    """What the darkest and the brightest colour stand for."""
    return float(values.min()), float(values.float().quantile(_BRIGHTEST))


def _marked(image: Tensor, attention: AttentionMaps) -> Tensor:
    marked, (row, column) = image.clone(), attention.query
    patch = image.shape[-1] // attention.maps.shape[-1]
    pixels = marked[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    red = torch.tensor([0.9, 0.1, 0.1], device=image.device)[:, None, None]
    pixels.copy_(0.3 * pixels + 0.7 * red)
    return marked
