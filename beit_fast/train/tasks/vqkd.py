"""Train BEiT v2's tokenizer: codes that reproduce a teacher's features (arXiv 2208.06366, section 2.2).

The codes begin with k-means on the latents of the first step, which is itself not quantised; from then on they follow
the latents they win by moving averages.
"""

import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.data import builtin
from beit_fast.data.loader import Request
from beit_fast.data.pretraining import PretrainBatch, PretrainLoader
from beit_fast.data.sampling import BlockwiseMasking, CropSampler
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import ImageSource, open_source, open_training_source
from beit_fast.data.sources.writing import naming
from beit_fast.models.hub import write_weights
from beit_fast.tokenizers.vqkd import VqkdTokenizer
from beit_fast.train.config import RunConfig, at_least_1, free, local
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.knn import KnnEvaluation
from beit_fast.train.task import StepOutput
from beit_fast.train.tasks.images import ImageTask
from beit_fast.train.tasks.teacher import Teacher, TeacherConfig, open_teacher
from beit_fast.visualize import pictures

_SHOWN = 12
"""Codes, and crops of each, in the picture of the codes."""
_PICTURED = 512
"""Held-out images, at most, that the picture is made of: 300 MB at 224 pixels."""


@dataclass(frozen=True, kw_only=True)
class VqkdDataConfig:
    """Images to learn from."""

    path: str | None = local(None, free=False)
    """Folder or tar shards with images; None takes the built-in ones."""
    builtin_images: int = 512
    """Number of built-in images where there is no path."""
    builtin_size: int = 256
    """Side of a built-in image in pixels."""
    cache_dir: str | None = local(None)
    """Where built-in images are kept; None: $BEIT_FAST_CACHE, or ~/.cache/beit_fast."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    max_bad_share: float = free(0.01)
    """Stop when more than this share of the images turns out to be unusable."""
    threads: int | None = local(None)
    """Threads that decode and crop; None: the cores of this process, at most 8."""
    prefetch: int = local(2)
    """Batches made ahead."""


@dataclass(frozen=True, kw_only=True)
class VqkdModelConfig:
    """The tokenizer; the defaults are the released one."""

    width: int = 768
    """Token width of encoder and decoder; heads have 64 dimensions."""
    depth: int = 12
    """Blocks of the encoder."""
    decoder_depth: int = 3
    """Blocks of the decoder."""
    image_size: int = 224
    """Side of the images in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels: one token each."""
    vocab_size: int = 8192
    """Codes."""
    code_dim: int = 32
    """Dimensions of a code."""

    def __post_init__(self) -> None:
        for name in ("depth", "decoder_depth", "vocab_size", "code_dim"):
            at_least_1(f"--model.{name.replace('_', '-')}", getattr(self, name))
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"--model.image-size {self.image_size} must be a multiple of --model.patch-size {self.patch_size}"
            )
        if self.width < 1 or self.width % 64:
            raise ValueError(f"--model.width {self.width} must be a multiple of 64: heads have 64 dimensions")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    def make(self, teacher_dim: int) -> VqkdTokenizer:
        """The tokenizer of these sizes for features of `teacher_dim` dimensions."""
        return VqkdTokenizer(
            self.vocab_size, self.code_dim, teacher_dim, self.width, self.depth, self.decoder_depth, self.grid,
            self.patch_size,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VqkdEvaluationConfig:
    """Held-out images."""

    images: int = free(200)
    """Number of held-out images, at most as many as there are; 0 evaluates nothing."""
    path: str | None = local(None)
    """Folder or shards of held-out images; None: built-in images of another seed, without photographs."""
    knn: str | None = free(None)
    """Labelled images, a folder with `train` and `val` in it: measure what k-NN and a linear classifier make of the
    encoder's mean patch tokens at every evaluation."""


@dataclass(frozen=True, kw_only=True)
class TrainVqkdConfig(RunConfig):
    """A run that trains BEiT v2's tokenizer."""

    commitment: float = 1.0
    """Weight of the loss that keeps latents near their codes."""
    decay: float = 0.99
    """Decay of the codes' moving averages per step."""
    kmeans_rounds: int = 10
    """Rounds of k-means that the codes start with."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: VqkdModelConfig = field(default_factory=VqkdModelConfig)
    data: VqkdDataConfig = field(default_factory=VqkdDataConfig)
    evaluation: VqkdEvaluationConfig = field(default_factory=VqkdEvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"--decay must be in [0, 1), got {self.decay:g}")


@dataclass(frozen=True)
class VqkdBatch:
    """What the tokenizer is trained on in one step."""

    images: Tensor
    """float32 (b, 3, S, S) in [0, 1]."""
    features: Tensor
    """float32 (b, N, T), the teacher's."""
    step: int

    def __len__(self) -> int:
        return len(self.images)


class TrainVqkd(ImageTask):
    """Trains a `VqkdTokenizer`; leaves `tokenizer.safetensors` and `codes.png` in the run folder."""

    name = "train_tokenizer_vqkd"
    config: TrainVqkdConfig

    def __init__(self, config: TrainVqkdConfig) -> None:
        super().__init__(config)
        self.held_out: PretrainLoader | None = None
        self.knn: KnnEvaluation | None = None

    def build(self, world: World) -> nn.Module:
        c, data = self.config, self.config.data
        self.world = world
        source: ImageSource
        if data.path is not None:  # before the teacher, which may have to be fetched
            source = open_training_source(data.path)
        else:
            source = builtin.builtin_source(data.cache_dir, data.builtin_images, c.seed, data.builtin_size)
        bad_images = self.screen(source, data.max_bad_share)
        self.teacher = self.open_teacher(world)
        self.loader = self._loader(source, bad_images)
        if c.evaluation.images:
            self.held_out = self._held_out()
            self.others.append(self.held_out)
        if c.evaluation.knn is not None:
            half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # what the encoder sees
            options = {"device": world.device, "decoder": "auto", "threads": data.threads, "prefetch": data.prefetch}
            self.knn = KnnEvaluation(
                c.evaluation.knn, c.model.image_size, data.max_bad_share, probe=True, **half, **options
            )
            self.others += self.knn.views
        torch.manual_seed(c.seed)  # whatever was drawn above, the initial weights are those of the seed
        side = (c.model.image_size,) * 2
        teacher_dim = self.teacher(torch.zeros(1, 3, *side, device=world.device)).shape[2]
        return c.model.make(teacher_dim).to(world.device)

    def open_teacher(self, world: World) -> Teacher:
        """The teacher on the grid of the tokenizer; for --dry-run without weights that would be fetched."""
        c = self.config
        return open_teacher(c.teacher, c.model.grid, world.device, pretrained=not c.dry_run)

    def _loader(self, source: ImageSource, bad_images: BadImages) -> PretrainLoader:
        c, data = self.config, self.config.data
        sampler = CropSampler(data.scale, (3 / 4, 4 / 3), data.flip_probability, *(data.jitter,) * 3)
        return PretrainLoader(
            source, BlockwiseMasking((1, 1), 0, mode="none"), sampler, seed=c.seed, image_size=c.model.image_size,
            token_image_size=None, device=self.world.device, bad_images=bad_images, threads=data.threads,
            prefetch=data.prefetch,
        )  # fmt: skip

    def _held_out(self) -> PretrainLoader:
        c, data = self.config, self.config.data
        source: ImageSource
        if c.evaluation.path is not None:
            source = open_source(c.evaluation.path)
        else:
            source = builtin.builtin_source(
                data.cache_dir, c.evaluation.images, c.seed + 1, data.builtin_size, photograph_share=0.0
            )
        return self._loader(source, BadImages(len(source), None, data.max_bad_share))

    def frozen(self) -> list[nn.Module]:
        return [self.teacher]

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"teacher_sha256": self.teacher.sha256()}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, VqkdTokenizer)
        return [*model.encoder.layers(), *model.decoder.layers()]

    def prepare(self, batch: PretrainBatch, step: int) -> VqkdBatch:
        """The images and what the teacher says of them."""
        return VqkdBatch(batch.token_images, self.teacher(batch.token_images), step)

    def loss(self, model: nn.Module, batch: VqkdBatch, num_targets: Tensor) -> StepOutput:
        distillation, commitment = model(batch.images, batch.features, batch.step > 0)
        loss = (distillation + self.config.commitment * commitment).sum() / num_targets
        tokenizer = getattr(model, "module", model)
        assert isinstance(tokenizer, VqkdTokenizer)
        used = tokenizer.quantize.used_share()
        sums = {"cosine": 1 - distillation.detach(), "commitment": commitment.detach(), "used": used.expand(len(batch))}
        images = torch.full((), float(len(batch)), device=loss.device)
        return StepOutput(loss, {name: values.sum() for name, values in sums.items()} | {"images": images})

    def after_step(self, model: nn.Module, step: int) -> None:
        assert isinstance(model, VqkdTokenizer)
        latents, ids = model.take_recent()
        if step == 0:
            model.quantize.initialise(latents, self.config.kmeans_rounds)
        else:
            model.quantize.update(latents, ids, self.config.decay)

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        images = sums["images"]
        return {
            "cosine": sums["cosine"] / images,
            "commitment": sums["commitment"] / images,
            "used_codes_share": sums["used"] / images,
        }

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Held-out images under the training crops.

        `held_out_cosine` of the decoder's features and the teacher's; `constant_cosine`, what one vector for all
        patches reaches at best; `held_out_used_codes_share` and `held_out_perplexity` of the codes on these images.
        """
        assert isinstance(model, VqkdTokenizer)
        values: dict[str, float] = {}
        if self.knn is not None:
            values |= self.knn.evaluate(model.encoder, self.world, self.config.batch_per_device)
        if self.held_out is None:
            return values
        with torch.autocast(self.world.device.type, enabled=False):  # as the tokenizer will be used
            return values | self._held_out_values(model)

    def _held_out_values(self, model: VqkdTokenizer) -> dict[str, float]:
        cosines = torch.zeros((), dtype=torch.float64)
        directions: Tensor | float = 0.0
        counts = torch.zeros(model.vocab_size, dtype=torch.float64)
        for images in self._held_out_images(self.config.evaluation.images):
            self.alive()
            ids, target = model.encode(images), self.teacher(images)
            predicted = model.decode_features(ids)
            cosines += F.cosine_similarity(predicted.float(), target, dim=-1).double().sum().cpu()
            directions = directions + F.normalize(target.double(), dim=-1).sum((0, 1)).cpu()
            counts += torch.bincount(ids.flatten().cpu(), minlength=model.vocab_size)
        patches = float(counts.sum())
        share = counts[counts > 0] / patches
        assert isinstance(directions, Tensor)
        return {
            "held_out_cosine": float(cosines) / patches,
            "constant_cosine": float(directions.norm()) / patches,
            "held_out_used_codes_share": len(share) / model.vocab_size,
            "held_out_perplexity": math.exp(-float((share * share.log()).sum())),
        }

    def _held_out_images(self, at_most: int) -> Iterator[Tensor]:
        """The first held-out images in batches, always the same."""
        assert self.held_out is not None
        count = min(at_most, self.config.evaluation.images, len(self.held_out.source))
        positions = np.array_split(np.arange(count, dtype=np.int64), -(-count // self.config.batch_per_device))
        return (batch.token_images for batch in self.held_out.batches(Request(0, part) for part in positions))

    def plan(self) -> dict[str, float]:
        side = (self.config.model.image_size,) * 2
        images = torch.zeros(1, 3, *side, device=self.world.device)
        with FlopCounterMode(display=False) as counter:
            features = self.teacher(images)
        teacher = float(counter.get_total_flops())
        model = self.config.model.make(features.shape[2]).to(self.world.device).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, features, True)
        forward = float(counter.get_total_flops())
        return {"flops_per_image": 3 * forward, "teacher_flops_per_image": teacher}

    def finish(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, VqkdTokenizer)
        metadata = {
            "command": shlex.join(["python", *sys.argv]),
            "data": builtin.NOTICE if self.config.data.path is None else self.config.data.path,
            "teacher": self.config.teacher.name,
            "teacher_sha256": self.teacher.sha256(),
        }
        tensors = {key: tensor.cpu().contiguous() for key, tensor in model.state_dict().items()}
        write_weights(tensors, folder / "tokenizer.safetensors", metadata)
        if self.held_out is not None:
            with torch.no_grad(), torch.autocast(self.world.device.type, enabled=False):
                sheet = codes_sheet(model, torch.cat([*self._held_out_images(_PICTURED)]))
            with naming(path := folder / "codes.png"):
                sheet.save(path)


def codes_sheet(tokenizer: VqkdTokenizer, images: Tensor, codes: int = _SHOWN, crops: int = _SHOWN) -> Any:
    """A PIL image: a row for each of the most frequent codes, of the crops nearest to it with a patch around.

    Args:
        images: (B, 3, S, S) in [0, 1].
        codes, crops: rows, and crops in each.
    """
    p = tokenizer.stride
    latents = torch.cat([tokenizer.latents(part) for part in images.split(32)]).flatten(0, 1)  # (B * N, d)
    ids = tokenizer.quantize.nearest(latents)
    frequent = torch.bincount(ids, minlength=tokenizer.vocab_size).topk(min(codes, tokenizer.vocab_size)).indices
    width = images.shape[3] // p
    around = F.pad(images, (p, p, p, p), value=0.5).unfold(2, 3 * p, p).unfold(3, 3 * p, p)  # (B, 3, h, w, 3p, 3p)
    rows = []
    for code in frequent:
        near = (latents @ tokenizer.quantize.codes[code]).masked_fill(ids != code, -2.0).topk(min(crops, len(ids)))
        index = near.indices[near.values > -2]
        image, patch = index // (len(ids) // len(images)), index % (len(ids) // len(images))
        row = around[image, :, patch // width, patch % width]  # (crops, 3, 3p, 3p), or fewer
        row = F.pad(row, (0, 0, 0, 0, 0, 0, 0, crops - len(row)), value=0.5)
        rows.append(row.permute(1, 2, 0, 3).flatten(2))
    return pictures.to_pil(torch.cat(rows, dim=1))
