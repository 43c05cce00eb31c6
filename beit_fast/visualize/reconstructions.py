"""Masked image modelling in pictures: what was hidden, and what the predicted tokens decode to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from beit_fast.models import BeitForMaskedImageModeling
from beit_fast.tokenizers import Tokenizer
from beit_fast.tokenizers.base import as_colours
from beit_fast.visualize import pictures

if TYPE_CHECKING:
    from PIL.Image import Image


class Reconstructions(NamedTuple):
    """B images and what became of them; pictures are float32 (B, C, S, S) in [0, 1] at the tokenizer's resolution."""

    original: Tensor
    masked: Tensor
    """With the masked patches in grey."""
    true_tokens: Tensor
    """The decoding of the image's own tokens: the best that predicting tokens can lead to."""
    predicted_tokens: Tensor
    """The decoding with the most probable tokens at the masked positions, the image's own elsewhere."""
    mask: Tensor
    """bool (B, h, w)."""
    tokens: Tensor
    """int64 (B, h, w), the image's own."""
    predicted: Tensor
    """int64 (B, h, w), the same with predictions at the masked positions."""


class Guess(NamedTuple):
    """Quality of tokens at the masked positions."""

    mean_absolute_error: float
    """Of the decoding against the image, over the pixels of masked patches; pixels lie in [0, 1]."""
    accuracy: float
    """Share of masked positions with the right token."""


@torch.no_grad()
def reconstruct(
    model: BeitForMaskedImageModeling, tokenizer: Tokenizer, images: Tensor, token_images: Tensor, mask: Tensor
) -> Reconstructions:
    """Predict the tokens of masked patches and decode them.

    Args:
        images: (B, C, S, S), normalised, as the model sees them.
        token_images: (B, C, h * stride, w * stride) in [0, 1], the same as the tokenizer sees them.
        mask: bool (B, h, w), true where a patch is hidden.

    Raises:
        ValueError: the model predicts pixels, or shapes do not fit.
    """
    if model.config.mim_target != "visual_tokens":
        raise ValueError("this model predicts pixels; only predicted tokens can be decoded")
    tokens = tokenizer.encode(as_colours(token_images, tokenizer))
    if mask.shape != tokens.shape:
        raise ValueError(f"mask must be {tuple(tokens.shape)}, one entry per token, got {tuple(mask.shape)}")
    predicted = tokens.clone()
    predicted[mask] = model.predict_tokens(images, mask).argmax(-1)
    hidden = pictures.enlarged(mask[:, None], tokenizer.stride)
    masked = torch.where(hidden, pictures.GREY, token_images)
    decoded = tokenizer.decode(tokens), tokenizer.decode(predicted)
    return Reconstructions(token_images, masked, *decoded, mask, tokens, predicted)


def reconstruction_sheet(parts: Reconstructions) -> Image:
    """Draw a row per image: original, masked input, decoding of its own tokens, decoding of the predicted ones."""
    shown = pictures.displayable(parts.original, parts.masked, parts.true_tokens, parts.predicted_tokens)
    rows = list(zip(*shown, strict=True))
    return pictures.sheet(rows, ["original", "masked input", "own tokens", "predicted"])


@torch.no_grad()
def guesses(parts: Sequence[Reconstructions], tokenizer: Tokenizer, seed: int = 0) -> dict[str, Guess]:
    """Measure how good four kinds of tokens at the masked positions are: `true`, `predicted`, `random`, `mode`.

    `random` are drawn from all tokens of these images, so with their frequencies; `mode` is the most frequent of them
    everywhere. Both have the images' own tokens at the visible positions, as `predicted` does.
    """
    every = torch.cat([part.tokens.flatten() for part in parts])
    mode = every.mode().values
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("true", "predicted", "random", "mode")}
    pixels = masked = 0
    for part in parts:
        original = as_colours(part.original, tokenizer)
        hidden = pictures.enlarged(part.mask[:, None], tokenizer.stride).expand_as(original)
        drawn = every[torch.randint(len(every), tuple(part.tokens.shape), generator=generator).to(every.device)]
        kinds = {
            "true": part.tokens,
            "predicted": part.predicted,
            "random": torch.where(part.mask, drawn, part.tokens),
            "mode": torch.where(part.mask, mode, part.tokens),
        }
        pixels, masked = pixels + int(hidden.sum()), masked + int(part.mask.sum())
        for name, tokens in kinds.items():
            error = (tokenizer.decode(tokens) - original).abs()[hidden].double().sum()
            right = (tokens == part.tokens)[part.mask].sum()
            sums[name] += torch.stack([error.cpu(), right.double().cpu()])
    return {name: Guess(float(s[0]) / pixels, float(s[1]) / masked) for name, s in sums.items()}
