"""Features of images by a frozen BEiT, and the accuracy of their nearest neighbours (Caron et al. 2021, DINO)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.data.classification import EvaluationLoader
from beit_fast.data.labelled import open_evaluation, open_training, with_classes
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


def probe_accuracy(
    train: Tensor, train_labels: Tensor, images: Tensor, labels: Tensor, classes: int, decay: float = 1e-3,
    iterations: int = 100,
) -> float:  # fmt: skip
    """Top-1 in percent of a linear classifier trained on the features: the same at every call.

    Features are standardised by those of the training; the weights, from zero, minimise the cross-entropy plus
    `decay` / 2 times their square, by L-BFGS in float64.

    Args:
        train, train_labels, images, labels: as of `knn_accuracy`.
    """
    mean, std = train.double().mean(0), train.double().std(0, correction=0).clamp_min(1e-6)
    x, y = ((part.double() - mean) / std for part in (train, images))
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, train_labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        solver.step(loss)
    with torch.no_grad():
        return 100 * float(((y @ weight.T + bias).argmax(1) == labels).double().mean())


class KnnEvaluation:
    """k-NN accuracy on a folder with `train` and `val` (class folders or shards), for a model as it is at the time.

    Args:
        path: as `open_training` and `open_evaluation` take it.
        image_size: side of the views, or height and width.
        max_bad_share: of the images that may be unreadable.
        probe: train a linear classifier on the same features as well.
        options: of `EvaluationLoader`: mean, std, device, threads, channels, ...
    """

    def __init__(
        self, path: str, image_size: int | tuple[int, int], max_bad_share: float = 0.01, probe: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        training = open_training(path)
        validation = with_classes(open_evaluation(path), training.classes, path)
        self.classes, self.probe = training.classes, probe
        self.views = [
            EvaluationLoader(
                part.source, part.labels, image_size=image_size, bad_images=BadImages(len(part), None, max_bad_share),
                **options,
            )
            for part in (training, validation)
        ]  # fmt: skip

    def evaluate(
        self, model: Beit, world: World, batch_size: int, k: int = 20, tokens: Tokens = "mean", block: int = -1
    ) -> dict[str, float]:
        """`knn_top1_percent`, `knn_top5_percent`, `knn_images`, and `probe_top1_percent` where there is a probe."""
        (train, own), (images, theirs) = (
            collect_features(model, views, world, batch_size, tokens, block) for views in self.views
        )
        labels = [torch.from_numpy(np.asarray(views.labels, np.int64)) for views in self.views]
        sets = (train, labels[0][own], images, labels[1][theirs], len(self.classes))
        top1, top5 = knn_accuracy(*sets, k)
        values = {"knn_top1_percent": top1, "knn_top5_percent": top5, "knn_images": len(images)}
        return values | ({"probe_top1_percent": probe_accuracy(*sets)} if self.probe else {})

    def close(self) -> None:
        for views in self.views:
            views.close()
