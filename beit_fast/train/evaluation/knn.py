"""Features of images by a frozen BEiT, and the accuracy of their nearest neighbours (Caron et al. 2021, DINO)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.data.classification import EvaluationLoader
from beit_fast.data.labelled import open_evaluation, open_training, with_classes
from beit_fast.data.loader import NORMALIZATION
from beit_fast.data.screening import BadImages
from beit_fast.models import Beit
from beit_fast.train.distributed.world import World

Tokens = Literal["mean", "cls", "patches"]
CHUNK = 1024
"""Images whose similarities to all training images are held at once."""


def image_features(model: Beit, images: Tensor, tokens: Tokens, block: int) -> Tensor:
    """(B, C, S, S) -> (B, D) in fp32: the mean patch token or CLS after a block, normed where the model has a norm.

    Args:
        tokens: with `patches`, all of them: (B, N-1, D).
        block: counted from 0, negative from the end.
    """
    found = model.forward_intermediates(
        images, [block], return_prefix_tokens=True, norm=True, stop_early=True, output_fmt="NLC",
        intermediates_only=True,
    )  # fmt: skip
    patches, cls = found[0]
    return {"mean": patches.mean(1), "cls": cls[:, 0], "patches": patches}[tokens].float()


@torch.no_grad()
def collect_features(
    model: Beit, views: EvaluationLoader, world: World, batch_size: int, tokens: Tokens = "mean", block: int = -1
) -> tuple[Tensor, Tensor]:
    """Return features (M, ...) on the CPU of the M images that could be read, and their indices (M,), on every rank."""
    count = len(views.labels)
    features: Tensor | None = None
    seen = torch.zeros(count, dtype=torch.int64, device=world.device)
    for batch in views.batches(batch_size, world.rank, world.size):
        found = image_features(model, batch.images, tokens, block)
        if features is None:
            features = found.new_zeros(count, *found.shape[1:])
        indices = batch.indices.to(found.device)
        features[indices], seen[indices] = found, 1
    if features is None:
        raise ValueError("not one image could be used; bad files are named above")
    world.sum(features)
    world.sum(seen)
    indices = seen.nonzero().squeeze(1)
    return features[indices].cpu(), indices.cpu()


def knn_accuracy(
    train: Tensor, train_labels: Tensor, images: Tensor, labels: Tensor, classes: int, k: int = 20,
    temperature: float = 0.07,
) -> tuple[float, float]:  # fmt: skip
    """Top-1 and top-5 in percent of a vote of the k nearest training images, DINO's protocol.

    Nearness is the cosine s of the features; a neighbour votes with exp(s / temperature).

    Args:
        train, train_labels: (n, D) and int64 (n,).
        images, labels: (m, D) and int64 (m,), the images to classify.
    """
    train, images = F.normalize(train, dim=1), F.normalize(images, dim=1)
    k = min(k, len(train))
    hits = torch.zeros(2)
    for part, right in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        similarity, neighbours = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, dtype=torch.float64)
        votes.scatter_add_(1, train_labels[neighbours], (similarity.double() / temperature).exp())
        first = votes.topk(min(5, classes), dim=1).indices == right[:, None]
        hits += torch.stack([first[:, 0].sum(), first.any(1).sum()])
    top1, top5 = (100 * hits / len(images)).tolist()
    return top1, top5


class KnnEvaluation:
    """k-NN accuracy on a folder with `train` and `val` (class folders or shards), for a model as it is at the time.

    Args:
        path: as `open_training` and `open_evaluation` take it.
        normalization: of the pixels, by name.
    """

    def __init__(
        self, path: str, image_size: int, normalization: str, device: torch.device, threads: int | None = None,
        max_bad_share: float = 0.01,
    ) -> None:  # fmt: skip
        training = open_training(path)
        validation = with_classes(open_evaluation(path), training.classes, path)
        self.classes = training.classes
        mean, std = NORMALIZATION[normalization]
        self.views = [
            EvaluationLoader(
                part.source, part.labels, image_size=image_size, mean=mean, std=std, device=device, threads=threads,
                bad_images=BadImages(len(part), None, max_bad_share),
            )
            for part in (training, validation)
        ]  # fmt: skip

    def evaluate(
        self, model: Beit, world: World, batch_size: int, k: int = 20, tokens: Tokens = "mean", block: int = -1
    ) -> dict[str, float]:
        """`knn_top1_percent`, `knn_top5_percent` and `knn_images`."""
        (train, own), (images, theirs) = (
            collect_features(model, views, world, batch_size, tokens, block) for views in self.views
        )
        labels = [torch.from_numpy(np.asarray(views.labels, np.int64)) for views in self.views]
        top1, top5 = knn_accuracy(train, labels[0][own], images, labels[1][theirs], len(self.classes), k)
        return {"knn_top1_percent": top1, "knn_top5_percent": top5, "knn_images": len(images)}

    def close(self) -> None:
        for views in self.views:
            views.close()
