"""Pre-training on held-out images: the masked loss, and the losses without image and without context."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.loader import Request
from beit_fast.data.pretraining import PretrainBatch, PretrainLoader
from beit_fast.models import BeitForMaskedImageModeling
from beit_fast.tokenizers import Tokenizer
from beit_fast.tokenizers.base import as_colours


def evaluate(
    model: BeitForMaskedImageModeling,
    tokenizer: Tokenizer | None,
    views: PretrainLoader,
    images: int,
    batch_size: int,
    predict_all: bool,
    alive: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], Tensor]:
    """Losses per masked patch (per patch, if `predict_all`) of the first `images` of `views`.

    `held_out_loss`, in nats; `token_entropy_nats`, the entropy of the tokens' distribution over all held-out patches,
    which is what a model that ignores its input can reach at best; `other_context_loss`, with the visible patches taken
    from another image, which is what a model that ignores the context would reach too. Where pixels are the target
    (no tokenizer), losses are squared errors, to be compared with `pixel_variance` about each channel's mean.
    And the histogram of the tokens, float64 (V,).

    Raises:
        ValueError: a batch would hold one image, whose context cannot be exchanged.
    """
    size = min(batch_size, images)
    if size < 2:
        raise ValueError("--evaluation.images and --batch-per-device must be at least 2: the context is exchanged")
    sums = torch.zeros(4, dtype=torch.float64)
    histogram = torch.zeros(1 if tokenizer is None else tokenizer.vocab_size, dtype=torch.float64)
    pixels = torch.zeros(3, model.config.in_chans, dtype=torch.float64)  # number, sum, sum of squares
    positions = np.array_split(np.arange(images, dtype=np.int64), max(images // size, 1))
    for batch in views.batches(Request(0, part) for part in positions):
        alive()
        tokens = None
        if tokenizer is None:
            flat = batch.images.double().transpose(0, 1).flatten(1).cpu()
            pixels += torch.stack([torch.full_like(flat[:, 0], flat.shape[1]), flat.sum(1), flat.square().sum(1)])
        else:
            with torch.autocast(batch.images.device.type, enabled=False):
                tokens = tokenizer.encode(as_colours(batch.token_images, tokenizer))
            histogram += torch.bincount(tokens.flatten().cpu(), minlength=len(histogram))
        right = model(batch.images, batch.mask, tokens, predict_all=predict_all)
        masked = right.num_masked
        sums[:3] += torch.tensor([masked, float(right.num_correct), float(right.loss) * masked])
        if tokenizer is not None:
            wrong = model(batch.images.roll(1, 0), batch.mask, tokens, predict_all=predict_all)
            sums[3] += float(wrong.loss) * masked
    masked, correct, right_sum, wrong_sum = sums.tolist()
    values = {"held_out_loss": right_sum / masked, "held_out_images": float(images)}
    if tokenizer is None:
        number, total, squares = pixels
        return values | {"pixel_variance": float((squares / number - (total / number).square()).mean())}, histogram
    share = histogram[histogram > 0] / histogram.sum()
    return values | {
        "held_out_accuracy": correct / masked,
        "token_entropy_nats": float(-(share * share.log()).sum()),
        "other_context_loss": wrong_sum / masked,
    }, histogram


def first(views: PretrainLoader, count: int) -> PretrainBatch:
    """The first images of the held-out order, always the same."""
    return next(iter(views.batches([Request(0, np.arange(count, dtype=np.int64))])))
