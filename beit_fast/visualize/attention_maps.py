"""What a patch attends to, head by head: the pictures of the paper's figure 2 and of its official script.

The attention of one block is computed in the open, all others run on the fused kernels (`attention_probabilities`).
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


class AttentionMaps(NamedTuple):
    """Attention from one patch of one image to all patches."""

    maps: Tensor
    """(H, h, w) float32; what each head gives to each patch. CLS is left out, so a map sums to at most 1."""
    masks: Tensor
    """bool (H, h, w): the patches with the largest attention, together `MASS` of the map."""
    query: tuple[int, int]
    """Row and column of the patch that looks."""


def attention_maps(
    model: BeitBackbone, image: Tensor, query: tuple[int, int] | None = None, block: int = -1, mass: float = MASS
) -> AttentionMaps:
    """The maps of patch `query` (None: the middle one) of a normalised image (C, S, S) in block `block`.

    The image may have any size that is a multiple of the patch; position parameters are resized.

    Raises:
        ValueError: there is no such patch or block, or `mass` is not in (0, 1].
    """
    patch = model.config.patch_size
    height, width = image.shape[-2] // patch, image.shape[-1] // patch
    row, column = (height // 2, width // 2) if query is None else query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"patch ({row}, {column}) lies outside the grid of {height} x {width} patches")
    token = torch.tensor([1 + row * width + column], device=image.device)
    rows = model.attention_probabilities(image[None], block, token)[0, :, 0, 1:]
    return AttentionMaps(rows.unflatten(1, (height, width)), top_mass(rows, mass).unflatten(1, (height, width)),
                         (row, column))  # fmt: skip


def top_mass(values: Tensor, mass: float) -> Tensor:
    """bool, as `values` (H, N): of each row the largest entries, as few as make up `mass` of its sum."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    ordered, order = values.double().sort(dim=1, descending=True)
    before = ordered.cumsum(1) - ordered  # what the larger ones make up already
    kept = before < mass * ordered.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def attention_sheet(image: Tensor, found: AttentionMaps) -> Image:
    """One picture: the image with the query patch marked, each head's map, and below each map the image it keeps.

    image: (3, S, S) in [0, 1], not normalised, whose patches the maps are of.
    """
    patch = image.shape[-1] // found.maps.shape[-1]
    marked = _marked(image, found.query, patch)
    maps = [pictures.heat(each / each.max(), patch) for each in found.maps]
    kept = [_kept(image, mask, patch) for mask in found.masks]
    blank = torch.full_like(image, pictures.PAPER)
    labels = ["query patch", *(f"head {number}" for number in range(len(maps)))]
    return pictures.sheet([[marked, *maps], [blank, *kept]], columns=labels)


def save_attention(folder: Path, image: Tensor, found: AttentionMaps) -> list[Path]:
    """Writes what the official script does: img.png, select.png, attn-head{j}.png and mask_th0.6_head{j}.png."""
    folder.mkdir(parents=True, exist_ok=True)
    patch = image.shape[-1] // found.maps.shape[-1]
    named = {"img.png": image, "select.png": _marked(image, found.query, patch)}
    for number, (values, mask) in enumerate(zip(found.maps, found.masks, strict=True)):
        named[f"attn-head{number}.png"] = pictures.heat(values / values.max(), patch)
        named[f"mask_th{MASS}_head{number}.png"] = _kept(image, mask, patch)
    named_paths = [folder / name for name in named]
    for path, pixels in zip(named_paths, named.values(), strict=True):
        pictures.to_pil(pixels).save(path)
    return named_paths


def _marked(image: Tensor, query: tuple[int, int], patch: int) -> Tensor:
    marked = image.clone()
    row, column = query
    place = (slice(None), slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch))
    red = torch.tensor([0.9, 0.1, 0.1], device=image.device)[:, None, None]
    marked[place] = 0.3 * marked[place] + 0.7 * red
    return marked


def _kept(image: Tensor, mask: Tensor, patch: int) -> Tensor:
    large = mask.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return torch.where(large, image, 0.25 * image + 0.75 * pictures.PAPER)
