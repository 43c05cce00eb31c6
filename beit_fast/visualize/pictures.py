"""Tensors to pictures: rows of equally large images with words at their head, and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER = 1.0
"""Brightness of what is empty."""
_GAP, _TEXT_HEIGHT, _SMALLEST = 6, 20, 96

# Nine points of matplotlib's viridis (CC0), from dark to light; between them colours are interpolated.
_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def to_pil(image: Tensor) -> Image:
    """(3, H, W) in [0, 1] -> an RGB picture."""
    from PIL import Image

    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous()
    return Image.fromarray(pixels.numpy())


def heat(values: Tensor, scale: int) -> Tensor:
    """(h, w) in [0, 1] -> (3, h * scale, w * scale) colours from dark blue (0) to yellow (1), each value a square."""
    colours = torch.tensor(_VIRIDIS, device=values.device).float() / 255
    place = values.detach().float().clamp(0, 1) * (len(_VIRIDIS) - 1)
    low = place.floor().long().clamp(max=len(_VIRIDIS) - 2)
    share = (place - low)[..., None]
    mixed = colours[low] * (1 - share) + colours[low + 1] * share  # (h, w, 3)
    return mixed.repeat_interleave(scale, 0).repeat_interleave(scale, 1).permute(2, 0, 1)


def mosaic(images: Tensor, columns: int) -> Image:
    """(B, 3, H, W) in [0, 1] side by side, `columns` in a row, a white line between them."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    page = torch.ones(3, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for number, image in enumerate(images.cpu()):
        y, x = divmod(number, columns)
        page[:, y * (height + 1) : y * (height + 1) + height, x * (width + 1) : x * (width + 1) + width] = image
    return to_pil(page)


def labels(ids: Tensor, scale: int) -> Tensor:
    """ids (h, w) -> (3, h * scale, w * scale): a colour for each number, the same everywhere, without an order."""
    mixed = (ids[None].long() + 1) * torch.tensor([73856093, 19349663, 83492791], device=ids.device)[:, None, None]
    colours = 0.15 + 0.8 * ((mixed ^ (mixed >> 13)) % 256).float() / 255
    return colours.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def sheet(rows: Sequence[Sequence[Tensor]], columns: Sequence[str]) -> Image:
    """Rows of images (3, H, W) in [0, 1], all of one size, under the names of their columns.

    Images below 96 pixels are enlarged without smoothing, so that single pixels can be told apart.

    Raises:
        ValueError: there is nothing to show, or a row has another number of images than there are columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"every row must have {len(columns)} images, got {[len(row) for row in rows]}")
    height, width = rows[0][0].shape[-2:]
    factor = max(1, -(-_SMALLEST // max(height, width)))
    height, width = height * factor, width * factor
    size = (len(columns) * (width + _GAP) + _GAP, _TEXT_HEIGHT + len(rows) * (height + _GAP) + _GAP)
    page = Image.new("RGB", size, (255, 255, 255))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for number, name in enumerate(columns):
        draw.text((_GAP + number * (width + _GAP), 4), name, fill=(60, 60, 60), font=font)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            page.paste(picture, (_GAP + x * (width + _GAP), _TEXT_HEIGHT + y * (height + _GAP)))
    return page
