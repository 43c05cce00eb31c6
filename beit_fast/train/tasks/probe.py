"""Linear probes of every block at once (paper, table 9; the official linear evaluation).

One linear classifier per block on that block's frozen output: CLS and mean patch token, no norm. Their losses are
added, which trains them independently. Without augmentation the features are computed once and kept.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from beit_fast.data.classification import Augmentation, ClassificationLoader, EvaluationLoader, LabelledBatch
from beit_fast.data.labelled import LabelledImages
from beit_fast.data.loader import NORMALIZATION, Request
from beit_fast.data.prefetch import Prefetcher
from beit_fast.data.sampling import epoch_order
from beit_fast.data.sources import fingerprint
from beit_fast.data.sources.writing import write_text
from beit_fast.models import Beit
from beit_fast.train.config import free, local
from beit_fast.train.distributed.world import World
from beit_fast.train.precision import DTYPES, precision_of
from beit_fast.train.task import StepOutput
from beit_fast.train.tasks.feature_cache import FeatureCache
from beit_fast.train.tasks.finetune import ClassifierModelConfig, LabelledDataConfig
from beit_fast.train.tasks.images import ImageTask, WeightsConfig
from beit_fast.train.tasks.model import multiply_adds
from beit_fast.train.tasks.weights import load_weights

Features = Literal["cls+mean", "mean", "cls"]
STATISTICS_IMAGES = 2048
"""Images from which features are standardised where they are not all computed beforehand."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(WeightsConfig):
    """Linear probes of all blocks."""

    weights: str | None = local(None, free=False)
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

    without_weights: ClassVar[str] = "name the model to probe, or --scratch for random weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim.clip_grad is not None:
            raise ValueError(
                "--optim.clip-grad would tie the probes of all layers together; give --optim.clip-grad None"
            )


@dataclass(frozen=True)
class FeatureBatch:
    """What the probes read of a batch of images."""

    features: Tensor
    """float32 (b, L, F)."""
    labels: Tensor
    """int64 (b,)."""

    def __len__(self) -> int:
        return len(self.labels)


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


class LinearProbe(ImageTask):
    """Trains `LayerProbes` on a frozen BEiT; the best layer is reported after each evaluation."""

    name = "linear_probe"
    config: ProbeConfig

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.cache: FeatureCache | None = None
        self.validation_cache: FeatureCache | None = None
        self.validation_loader: EvaluationLoader | None = None
        self.measured: dict[str, float] = {}

    def build(self, world: World) -> nn.Module:
        c = self.config
        self.world = world
        self.dtype = DTYPES[precision_of(c, world.device)]
        self.training, validation = c.data.open()
        self.classes = self.training.classes
        torch.manual_seed(c.seed)
        backbone = Beit(c.model.classifier(0, c.data.in_chans))
        if c.weights is not None:
            load_weights(backbone, c.weights, verbose=world.is_main)
        self.backbone = backbone.to(world.device).requires_grad_(False).eval()
        width = backbone.config.width * (2 if c.features == "cls+mean" else 1)
        probes = LayerProbes(backbone.config.depth, width, len(self.classes)).to(world.device)
        self._open(probes, validation)
        return probes

    def _open(self, probes: LayerProbes, validation: LabelledImages | None) -> None:
        """Open views or cached features, and set the scale of the features."""
        c, data, world = self.config, self.config.data, self.world
        bad_images = self.screen(self.training.source, data.max_bad_share)
        if validation is not None:
            self.validation_loader = self._evaluation_loader(validation)
        if c.augment or c.dry_run:
            self.loader = ClassificationLoader(
                self.training.source, self.training.labels, Augmentation(), seed=c.seed,
                image_size=c.model.image_size, bad_images=bad_images, **data.loader_options(world.device),
            )  # fmt: skip
            if c.standardise and not c.dry_run:
                self._standardise(probes, self._statistics())
            return
        shape = (probes.weight.shape[0], probes.weight.shape[1])
        self.cache = self._cached("training", self.training, self._evaluation_loader(self.training), shape)
        if validation is not None and self.validation_loader is not None:
            self.validation_cache = self._cached("validation", validation, self.validation_loader, shape)
        self.used = self.cache.rows()
        if c.standardise:
            self._standardise(probes, self.cache.moments())

    def _evaluation_loader(self, images: LabelledImages) -> EvaluationLoader:
        loader = self.config.data.evaluation_loader(images, self.config.model.image_size, self.world.device)
        self.others.append(loader)
        return loader

    def _cached(
        self, name: str, images: LabelledImages, loader: EvaluationLoader, shape: tuple[int, int]
    ) -> FeatureCache:
        c = self.config
        # mean and std from a file count themselves: the file may change
        own = c.data.channels is not None or c.data.normalization not in NORMALIZATION
        key = {
            "model": weights_checksum(self.backbone), "data": fingerprint(images.source), "features": c.features,
            "image_size": c.model.image_size, "crop_share": loader.crop_share, "normalization": c.data.normalization,
            "precision": str(self.dtype), **(c.data.description() if own else {}),
            "value_range": c.data.value_range, "labels": zlib.crc32(images.labels.tobytes()),
            "num_heads": self.backbone.config.num_heads,  # which a model without a table of biases does not show
        }  # fmt: skip
        cache = FeatureCache(c.output_dir / "features" / name, key, (len(images), *shape), self.world)
        if not cache.complete:
            batches = loader.batches(c.feature_batch, self.world.rank, self.world.size)
            cache.fill((batch.indices, self._features(batch.images), batch.labels) for batch in batches)
        return cache

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.world.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return block_features(self.backbone, images, self.config.features)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the features of the first images, the same on every rank."""
        collected, count = [], 0
        for batch in self._evaluation_loader(self.training).batches(self.config.feature_batch):
            collected.append(self._features(batch.images).double().cpu())
            count += len(batch)
            if count >= STATISTICS_IMAGES:
                break
        features = torch.cat(collected)
        return features.mean(0).float(), features.std(0, correction=0).float()

    def _standardise(self, probes: LayerProbes, moments: tuple[Tensor, Tensor]) -> None:
        probes.mean.copy_(moments[0])
        probes.std.copy_(moments[1].clamp_min(1e-6))

    def frozen(self) -> list[nn.Module]:
        return [self.backbone]

    def num_samples(self) -> int:
        return len(self.training) if self.cache is None else len(self.used)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model": weights_checksum(self.backbone)}

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """One group: the official linear evaluation decays biases as well."""
        named = list(model.named_parameters())
        return [{"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": weight_decay}]

    def batches(self, requests: Iterator[Request]) -> Iterator[LabelledBatch | FeatureBatch]:
        return super().batches(requests) if self.cache is None else self._cached_batches(self.cache, requests)

    def _cached_batches(self, cache: FeatureCache, requests: Iterator[Request]) -> Iterator[FeatureBatch]:
        length, seed = len(self.used), self.config.seed
        rows = (self.used[epoch_order(request.positions, length, seed, request.epoch)] for request in requests)
        prefetcher = Prefetcher(map(cache.take, rows), self.config.data.prefetch)
        try:
            for features, labels in prefetcher:
                yield FeatureBatch(features.to(self.world.device), labels.to(self.world.device))
        finally:
            prefetcher.close()

    def prepare(self, batch: LabelledBatch | FeatureBatch, step: int) -> FeatureBatch:
        """The features of the batch, computed here where they are not cached."""
        if isinstance(batch, LabelledBatch):
            return FeatureBatch(self._features(batch.images), batch.labels)
        return batch

    def loss(self, model: nn.Module, batch: FeatureBatch, num_targets: Tensor) -> StepOutput:
        logits = model(batch.features).float()  # (B, L, C)
        targets = batch.labels[:, None].expand(logits.shape[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_targets
        correct = (logits.argmax(-1) == targets).sum(0)
        sums = {f"correct_{layer}": count for layer, count in enumerate(correct.unbind(), start=1)}
        return StepOutput(loss, sums | {"images": torch.ones_like(batch.labels).sum()})

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        best = max(value for name, value in sums.items() if name.startswith("correct_"))
        return {"best_train_top1_percent": 100 * best / sums["images"]}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1 of every layer's probe on the validation images, layers counted from 1, and the best of them."""
        if self.validation_loader is None:
            return {}
        assert isinstance(model, LayerProbes)
        layers = model.weight.shape[0]
        sums = torch.zeros(layers + 1, dtype=torch.float64, device=self.world.device)
        for batch in self._validation_batches(self.validation_loader):
            self.alive()
            sums[:layers] += (model(batch.features).argmax(-1) == batch.labels[:, None]).sum(0)
            sums[layers] += len(batch)
        *correct, total = self.world.sum(sums).tolist()
        if not total:
            raise ValueError("not one validation image could be used; bad files are named above")
        percents = [100 * count / total for count in correct]
        best = max(range(layers), key=percents.__getitem__)
        values = {f"layer{layer:02d}_top1_percent": value for layer, value in enumerate(percents, start=1)}
        best_values = {"best_layer": best + 1, "best_top1_percent": percents[best]}
        self.measured = values | best_values | {"validation_images": total}
        return self.measured

    def _validation_batches(self, loader: EvaluationLoader) -> Iterator[FeatureBatch]:
        rank, size, batch_size = self.world.rank, self.world.size, self.config.feature_batch
        if self.validation_cache is None:
            yield from (self.prepare(batch, 0) for batch in loader.batches(batch_size, rank, size))
            return
        rows = self.validation_cache.rows()[rank::size]
        for start in range(0, len(rows), batch_size):
            features, labels = self.validation_cache.take(rows[start : start + batch_size])
            yield FeatureBatch(features.to(self.world.device), labels.to(self.world.device))

    def finish(self, model: nn.Module, folder: Path) -> None:
        described = {"features": self.config.features, "weights": str(self.config.weights), "classes": self.classes}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "probes.safetensors", metadata={"probe": json.dumps(described)})
        rows = [f"{name[5:7]}\t{value:.2f}" for name, value in self.measured.items() if name.startswith("layer")]
        if rows:
            write_text(folder / "layers.tsv", "\n".join(["layer\ttop1_percent", *rows]) + "\n")

    def plan(self) -> dict[str, float]:
        forward = 2.0 * multiply_adds(self.backbone.config)
        return {"forward_flops_per_image": forward, "flops_per_image": forward}


def weights_checksum(model: nn.Module) -> str:
    """Eight hexadecimal digits of a model's parameters: crc32 over their bytes, by name."""
    crc = 0
    for name, parameter in sorted(model.state_dict().items()):
        crc = zlib.crc32(parameter.detach().cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
