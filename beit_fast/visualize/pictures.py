"""Tensors to pictures: heat maps, and sheets of images under the names of their columns.

Sheets are transparent where they are empty and their words are grey, so that they suit a light and a dark page.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image

GREY = 0.5
"""Brightness of what is hidden."""
_WORDS = (120, 120, 120, 255)
_GAP, _LINE = 6, 16

# Nine points of matplotlib's viridis (CC0), from dark to light; between them colours are interpolated.
_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def to_pil(image: Tensor) -> Image:
    """Convert (3, H, W) in [0, 1] to an RGB picture."""
    from PIL import Image

    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous()
    return Image.fromarray(pixels.numpy())


def displayable(reference: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Images (B, C, H, W) in [0, 1] as RGB (B, 3, H, W) for the eye; images of three channels stay as they are.

    One channel becomes grey, two become magenta and green, of more the first three are shown. Each channel is stretched
    from the 0.5th to the 99.5th percentile of the reference's: scans of 16 bits often fill a small part of their scale.
    The `others`, of the same scale, are stretched alike.
    """
    channels = reference.shape[1]
    if channels == 3:
        return reference, *others
    order = {1: [0, 0, 0], 2: [0, 1, 0]}.get(channels, [0, 1, 2])
    values = reference.detach().float().transpose(0, 1).flatten(1)
    step = max(1, values.shape[1] // 1_000_000)  # of more elements quantile makes no use
    low, high = values[:, ::step].quantile(torch.tensor([0.005, 0.995], device=values.device), dim=1)
    scale = (high - low).clamp_min(1e-6)

    def shown(images: Tensor) -> Tensor:
        if images.shape[1] == 3:  # of a tokenizer of colours
            images = images.mean(1, keepdim=True) if channels == 1 else images
        stretched = (images - low[:, None, None]) / scale[:, None, None]
        return stretched.clamp(0, 1)[:, order]

    return tuple(shown(images) for images in (reference, *others))


def heat(values: Tensor, scale: int) -> Tensor:
    """Colour (h, w) in [0, 1] from dark blue (0) to yellow (1): (3, h * scale, w * scale), each value a square."""
    colours = torch.tensor(_VIRIDIS, device=values.device).float() / 255
    position = values.detach().float().clamp(0, 1) * (len(_VIRIDIS) - 1)
    low = position.floor().long().clamp(max=len(_VIRIDIS) - 2)
    mixed = torch.lerp(colours[low], colours[low + 1], (position - low)[..., None])  # (h, w, 3)
    return enlarged(mixed.permute(2, 0, 1), scale)


def enlarged(images: Tensor, scale: int) -> Tensor:
    """Repeat (..., h, w) to (..., h * scale, w * scale)."""
    return images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def mosaic(images: Tensor, columns: int) -> Image:
    """Lay images (B, 3, H, W) in [0, 1] side by side, `columns` in a row, with a white line between them."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    page = torch.ones(3, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for number, image in enumerate(images.cpu()):
        y, x = divmod(number, columns)
        page[:, y * (height + 1) : y * (height + 1) + height, x * (width + 1) : x * (width + 1) + width] = image
    return to_pil(page)


def labels(ids: Tensor, scale: int) -> Tensor:
    """Colour ids (h, w): (3, h * scale, w * scale), a colour for each number, the same everywhere, without an order."""
    mixed = (ids[None].long() + 1) * torch.tensor([73856093, 19349663, 83492791], device=ids.device)[:, None, None]
    return enlarged(0.15 + 0.8 * ((mixed ^ (mixed >> 13)) % 256).float() / 255, scale)


def sheet(
    rows: Sequence[Sequence[Tensor]], columns: Sequence[str], smallest: int = 224, legend: Image | None = None
) -> Image:
    """Lay out rows of images under the names of their columns.

    Args:
        rows: images (3, H, W) in [0, 1], those of a row of one size; a row without `smallest` pixels in either
            direction is enlarged without smoothing, so that single pixels can be told apart.
        columns: their names, of one line or more.
        legend: goes below them.

    Raises:
        ValueError: there is nothing to show, or a row has another number of images than there are columns.
    """
    from PIL import Image, ImageDraw

    if not rows or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"every row must have {len(columns)} images, got {[len(row) for row in rows]}")
    factors = [max(1, -(-smallest // max(row[0].shape[-2:]))) for row in rows]
    pictures = [[to_pil(enlarged(image, n)) for image in row] for row, n in zip(rows, factors, strict=True)]
    head = _LINE * max(name.count("\n") + 1 for name in columns) + 4
    width = max(sum(picture.width + _GAP for picture in row) for row in pictures) + _GAP
    height = head + sum(row[0].height + _GAP for row in pictures) + (legend.height + _GAP if legend else 0)
    page = Image.new("RGBA", (max(width, legend.width if legend else 0), height))
    draw, top = ImageDraw.Draw(page), head
    for number, row in enumerate(pictures):
        left = _GAP
        for name, picture in zip(columns, row, strict=True):
            if number == 0:
                write(draw, (left, 2), name)
            page.paste(picture, (left, top))
            left += picture.width + _GAP
        top += row[0].height + _GAP
    if legend:
        page.paste(legend, (0, top))
    return page


def write(draw: ImageDraw.ImageDraw, position: tuple[float, float], words: str) -> float:
    """Write words in the grey that can be read on a light and on a dark page; returns where they end."""
    from PIL import ImageFont

    font, words = ImageFont.load_default(size=12), printable(words)
    draw.text(position, words, fill=_WORDS, font=font)
    return position[0] + max(font.getlength(line) for line in words.split("\n"))


def colour_scale(low: str, high: str) -> Image:
    """Draw the colours of `heat` between what they stand for."""
    from PIL import Image, ImageDraw

    bar = to_pil(heat(torch.linspace(0, 1, 120)[None].expand(12, -1), 1))
    legend = Image.new("RGBA", (8 * (len(low) + len(high)) + bar.width, 20))
    draw = ImageDraw.Draw(legend)
    left = int(write(draw, (_GAP, 2), low)) + _GAP
    legend.paste(bar, (left, 4))
    write(draw, (left + bar.width + _GAP, 2), high)
    return legend


def class_legend(entries: Sequence[tuple[str, tuple[int, ...]]], width: int) -> Image:
    """Draw a square of each colour beside its name, in as many columns as `width` pixels hold."""
    from PIL import Image, ImageDraw

    columns = max(1, width // 170)
    legend = Image.new("RGBA", (max(width, 170), max(1, -(-len(entries) // columns)) * 20))
    draw = ImageDraw.Draw(legend)
    for number, (name, colour) in enumerate(entries):
        left, top = _GAP + number % columns * 170, number // columns * 20
        draw.rectangle((left, top + 2, left + 14, top + 16), colour)
        write(draw, (left + 20, top), name[:22])
    return legend


def printable(name: str) -> str:
    """Return a name for fonts: bytes that are no UTF-8 (surrogates in `name`) become question marks in boxes."""
    return os.fsencode(name).decode(errors="replace")
