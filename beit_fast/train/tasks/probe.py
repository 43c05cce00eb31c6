"""Linear probes of every block at once (paper, table 9; the official linear evaluation).

One linear classifier per block on that block's frozen output: CLS and mean patch token side by side, no norm. Their
losses are added, which trains them independently. Without augmentation the features are computed once and kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.data.classification import Augmentation, ClassificationLoader, EvaluationLoader, LabelledBatch
from beit_fast.data.labelled import LabelledImages
from beit_fast.data.loader import NORMALIZATION, Request
from beit_fast.data.prefetch import Prefetcher
from beit_fast.data.sampling import epoch_order
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import fingerprint
from beit_fast.models import Beit
from beit_fast.train.config import RunConfig, free
from beit_fast.train.distributed.world import World
from beit_fast.train.precision import DTYPES, precision_of
from beit_fast.train.task import StepOutput, Task
from beit_fast.train.tasks.feature_cache import FeatureCache
from beit_fast.train.tasks.finetune import (
    ClassifierModelConfig,
    LabelledDataConfig,
    evaluation_views,
    multiply_adds,
    open_data,
)
from beit_fast.train.tasks.weights import load_weights

Features = Literal["cls+mean", "mean", "cls"]
STATISTICS_IMAGES = 2048
"""Images from which features are standardised where they are not all computed beforehand."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(RunConfig):
    """Linear probes of all blocks."""

    weights: str | None = None
    """The model to probe: a run folder, or a file of the official code, timm or transformers."""
    scratch: bool = False
    """Probe random weights on purpose, for comparison."""
    features: Features = "cls+mean"
    """What a probe reads: CLS and mean patch token (official code), the mean alone (paper), or CLS alone."""
    standardise: bool = False
    """Give each feature mean 0 and standard deviation 1 over the training images; the official code does not."""
    augment: bool = True
    """Random resized crops and flips; without them features are computed once and kept in the run folder."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    feature_batch: int = free(64)
    """Images per forward pass where features are computed beforehand."""


class LayerProbes(nn.Module):
    """L independent linear classifiers, and the scale of their inputs.

    Args:
        layers, width, classes: L, F, C.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: int, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, width, classes).normal_(std=0.01))
        self.bias = nn.Parameter(torch.zeros(layers, classes))
        self.register_buffer("mean", torch.zeros(layers, width))
        self.register_buffer("std", torch.ones(layers, width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, L, F) -> (B, L, C)."""
        scaled = (features - self.mean) / self.std
        return torch.einsum("blf,lfc->blc", scaled, self.weight) + self.bias


def block_features(model: Beit, images: Tensor, features: Features) -> Tensor:
    """The raw output of every block, pooled: images (B, 3, S, S) -> (B, L, F), F = D or 2 D; fp32."""
    pooled = []
    for patches, cls in model.forward_intermediates(
        images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    ):
        parts = {"cls": (cls[:, 0],), "mean": (patches.mean(1),)}.get(features, (cls[:, 0], patches.mean(1)))
        pooled.append(torch.cat(parts, dim=-1).float())
    return torch.stack(pooled, dim=1)


class LinearProbe(Task):
    """Trains `LayerProbes` on a frozen BEiT; the best layer is reported after each evaluation."""

    name = "linear_probe"

    def __init__(self, config: ProbeConfig) -> None:
        self.config = config
        self.open_views: list[Any] = []
        self.cache: FeatureCache | None = None
        self.validation_cache: FeatureCache | None = None
        self.validation_views: EvaluationLoader | None = None
        self.bad_images: BadImages | None = None
        self.measured: dict[str, float] = {}

    def build(self, config: RunConfig, world: World) -> nn.Module:
        c = self.config
        if c.weights is None and not c.scratch and c.data.path is not None:
            raise ValueError("--weights is missing: name the model to probe, or --scratch for random weights")
        if c.weights is not None and c.scratch:
            raise ValueError("--weights and --scratch contradict each other; give one of them")
        if c.optim.clip_grad is not None:
            raise ValueError(
                "--optim.clip-grad would tie the probes of all layers together; give --optim.clip-grad None"
            )
        self.world = world
        self.dtype = DTYPES[precision_of(c, world.device)]
        self.training, self.validation = open_data(c.data)
        self.classes = self.training.classes
        torch.manual_seed(c.seed)
        backbone = Beit(c.model.classifier(0))
        if c.weights is not None:
            load_weights(backbone, c.weights, verbose=world.is_main)
        self.backbone = backbone.to(world.device).requires_grad_(False).eval()
        width = backbone.config.width * (2 if c.features == "cls+mean" else 1)
        probes = LayerProbes(backbone.config.depth, width, len(self.classes)).to(world.device)
        self._open(probes, (backbone.config.depth, width))
        return probes

    def _open(self, probes: LayerProbes, shape: tuple[int, int]) -> None:
        """Views or cached features, and the scale of the features."""
        c, data, world = self.config, self.config.data, self.world
        self.bad_images = BadImages(len(self.training), None, data.max_bad_share)
        if self.validation is not None:
            self.validation_views = self._evaluation_views(self.validation)
        if c.augment or c.dry_run:
            mean, std = NORMALIZATION[data.normalization]
            self.views = ClassificationLoader(
                self.training.source, self.training.labels, Augmentation(), seed=c.seed,
                image_size=c.model.image_size, mean=mean, std=std, device=world.device, decoder=data.decoder,
                bad_images=self.bad_images, threads=data.threads, prefetch=data.prefetch,
            )  # fmt: skip
            self.open_views.append(self.views)
            if c.standardise and not c.dry_run:
                self._standardise(probes, self._statistics())
            return
        self.cache = self._cached("training", self.training, self._evaluation_views(self.training), shape)
        if self.validation is not None and self.validation_views is not None:
            self.validation_cache = self._cached("validation", self.validation, self.validation_views, shape)
        self.used = self.cache.rows()
        if c.standardise:
            self._standardise(probes, self.cache.moments())

    def _evaluation_views(self, images: LabelledImages) -> EvaluationLoader:
        views = evaluation_views(self.config.data, images, self.config.model.image_size, self.world.device)
        self.open_views.append(views)
        return views

    def _cached(
        self, name: str, images: LabelledImages, views: EvaluationLoader, shape: tuple[int, int]
    ) -> FeatureCache:
        c = self.config
        key = {
            "model": weights_checksum(self.backbone), "data": fingerprint(images.source), "features": c.features,
            "image_size": c.model.image_size, "crop_share": views.crop_share, "normalization": c.data.normalization,
            "precision": str(self.dtype),
        }  # fmt: skip
        cache = FeatureCache(c.output_dir / "features" / name, key, (len(images), *shape), self.world)
        if not cache.complete:
            batches = views.batches(c.feature_batch, self.world.rank, self.world.size)
            cache.fill((batch.indices, self._features(batch.images), batch.labels) for batch in batches)
        return cache

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.world.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return block_features(self.backbone, images, self.config.features)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the features of the first images, the same on every rank."""
        collected, count = [], 0
        for batch in self._evaluation_views(self.training).batches(self.config.feature_batch):
            collected.append(self._features(batch.images).double().cpu())
            count += len(batch)
            if count >= STATISTICS_IMAGES:
                break
        features = torch.cat(collected)
        return features.mean(0).float(), features.std(0, correction=0).float()

    def _standardise(self, probes: LayerProbes, moments: tuple[Tensor, Tensor]) -> None:
        probes.mean.copy_(moments[0])
        probes.std.copy_(moments[1].clamp_min(1e-6))

    def num_samples(self) -> int:
        return len(self.training) if self.cache is None else len(self.used)

    def identity(self) -> dict[str, Any]:
        return {"data": fingerprint(self.training.source), "model": weights_checksum(self.backbone)}

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """One group: the official linear evaluation decays biases as well."""
        named = list(model.named_parameters())
        return [{"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": weight_decay}]

    def batches(self, requests: Iterator[Request]) -> Iterator[Any]:
        if self.cache is None:
            return self.views.batches(requests)
        return self._cached_batches(requests)

    def _cached_batches(self, requests: Iterator[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        cache, length, seed = self.cache, len(self.used), self.config.seed
        assert cache is not None
        rows = (self.used[epoch_order(request.positions, length, seed, request.epoch)] for request in requests)
        prefetcher = Prefetcher(map(cache.take, rows), self.config.data.prefetch)
        try:
            for features, labels in prefetcher:
                yield features.to(self.world.device), labels.to(self.world.device)
        finally:
            prefetcher.close()

    def num_targets(self, batch: LabelledBatch | tuple[Tensor, Tensor]) -> int:
        return len(batch) if isinstance(batch, LabelledBatch) else len(batch[0])

    def prepare(self, batch: LabelledBatch | tuple[Tensor, Tensor], step: int) -> tuple[Tensor, Tensor]:
        if isinstance(batch, LabelledBatch):
            return self._features(batch.images), batch.labels
        return batch

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], num_targets: Tensor) -> StepOutput:
        features, labels = batch
        logits = model(features).float()  # (B, L, C)
        targets = labels[:, None].expand(logits.shape[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_targets
        correct = (logits.argmax(-1) == targets).sum(0)
        sums = {f"correct_{layer}": count for layer, count in enumerate(correct.unbind(), start=1)}
        return StepOutput(loss, sums | {"images": torch.ones_like(labels).sum()})

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        best = max(value for name, value in sums.items() if name.startswith("correct_"))
        return {"best_train_top1_percent": 100 * best / sums["images"]}

    def counters(self) -> dict[str, float]:
        return {} if self.bad_images is None else {"bad_images": len(self.bad_images)}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1 of every layer's probe on the validation images, layers counted from 1, and the best of them."""
        if self.validation_views is None:
            return {}
        assert isinstance(model, LayerProbes)
        layers = model.weight.shape[0]
        sums = torch.zeros(layers + 1, dtype=torch.float64, device=self.world.device)
        for features, labels in self._validation_features():
            sums[:layers] += (model(features).argmax(-1) == labels[:, None]).sum(0)
            sums[layers] += len(labels)
        *correct, total = self.world.sum(sums).tolist()
        if not total:
            raise ValueError("not one validation image could be used; bad files are named above")
        percents = [100 * count / total for count in correct]
        best = max(range(layers), key=percents.__getitem__)
        values = {f"layer{layer:02d}_top1_percent": value for layer, value in enumerate(percents, start=1)}
        best_values = {"best_layer": best + 1, "best_top1_percent": percents[best]}
        self.measured = values | best_values | {"validation_images": total}
        return self.measured

    def _validation_features(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, size, batch_size = self.world.rank, self.world.size, self.config.feature_batch
        if self.validation_cache is not None:
            rows = self.validation_cache.rows()[rank::size]
            for start in range(0, len(rows), batch_size):
                features, labels = self.validation_cache.take(rows[start : start + batch_size])
                yield features.to(self.world.device), labels.to(self.world.device)
            return
        assert self.validation_views is not None
        for batch in self.validation_views.batches(batch_size, rank, size):
            yield self._features(batch.images), batch.labels

    def finish(self, model: nn.Module, run_dir: Path) -> None:
        rows = [f"{name[5:7]}\t{value:.2f}" for name, value in self.measured.items() if name.startswith("layer")]
        if rows:
            path = run_dir / "layers.tsv"
            path.write_text("\n".join(["layer\ttop1_percent", *rows]) + "\n")
            print(f"wrote {path}", flush=True)

    def plan(self, config: RunConfig) -> dict[str, float]:
        forward = 2.0 * multiply_adds(self.backbone.config)
        return {"forward_flops_per_image": forward, "flops_per_image": forward}

    def close(self) -> None:
        for views in self.open_views:
            views.close()


def weights_checksum(model: nn.Module) -> str:
    """Eight hexadecimal digits of a model's parameters: crc32 over their bytes, by name."""
    crc = 0
    for name, parameter in sorted(model.state_dict().items()):
        crc = zlib.crc32(parameter.detach().cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
