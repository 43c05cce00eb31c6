"""Train a tokenizer: `DiscreteVAE` weights from images.

The objective here is nearest-code quantisation with a codebook of moving averages: it gives a usable vocabulary within
minutes, where Gumbel relaxation of the same small networks collapses to a handful of codes. The paper's own objective
is `dvae.TrainRelaxedVAE`, which shares data, measurement and pictures.
"""

import json
import math
import shlex
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.data import builtin
from beit_fast.data.loader import Request
from beit_fast.data.pretraining import PretrainBatch, PretrainLoader
from beit_fast.data.sampling import BlockwiseMasking, CropSampler
from beit_fast.data.sources import ImageSource, open_training_source
from beit_fast.data.sources.writing import naming
from beit_fast.models.hub import write_weights
from beit_fast.tokenizers import Tokenizer
from beit_fast.tokenizers.vector_quantizer import QuantizedAutoencoder
from beit_fast.train.config import RunConfig, free, local
from beit_fast.train.distributed.world import World
from beit_fast.train.schedules import run_length
from beit_fast.train.task import StepOutput
from beit_fast.train.tasks.images import ImageTask
from beit_fast.visualize import pictures

HELD_OUT_SEED = 1_000_003
"""Seed of the built-in images on which tokenizers are measured; they hold no photographs."""


@dataclass(frozen=True, kw_only=True)
class TokenizerDataConfig:
    """Images to learn from."""

    path: Path | None = field(default=None, metadata={"local": True})
    """Folder or tar shards with images; None takes the built-in ones."""
    builtin_images: int = 2000
    """Number of built-in images to draw where no path is given."""
    cache_dir: Path | None = field(default=None, metadata={"free": True, "local": True})
    """Where built-in images are kept; None is the user's cache folder."""
    view_sizes: tuple[int, ...] = (64, 112)
    """Pixels per side of the training views; steps take them in turn, so that one tokenizer serves several scales."""
    channels: int | None = None
    """Channels that all images have, read with the depth they have; None: everything becomes RGB of 8 bits."""
    value_range: tuple[float, float] | None = None
    """Values that are black and white; without it float images are refused, and others have their type's."""
    max_bad_share: float = free(0.01)
    """Stop when more than this share of the images turns out to be unusable."""
    threads: int = local(1)
    """Threads that decode and crop."""

    def __post_init__(self) -> None:
        if not self.view_sizes or any(size < 8 or size % 8 for size in self.view_sizes):
            raise ValueError(f"--data.view-sizes must be multiples of 8 pixels, not {self.view_sizes}")
        if self.channels is not None and self.path is None:
            raise ValueError("--data.channels needs --data.path: the built-in images are RGB of 8 bits")


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The codebook (van den Oord et al., 2017, appendix A.1), with k-means start and re-seeding of dead codes."""

    live_codes: int = 1024
    """Codes that exist. The rest of the vocabulary never wins; fewer codes are learnt faster by a small BEiT."""
    init_latents: int = 16384
    """Latents that k-means starts from, at least 4 per code."""
    kmeans_rounds: int = 4
    """Rounds of k-means at the start."""
    autoencoder_steps: int = 300
    """Steps without quantisation, before k-means."""
    decay: float = 0.99
    """Decay of the moving averages per step."""
    commitment: float = 0.25
    """Weight of the loss that keeps latents near their codes."""
    reseed_every_steps: int = 20
    """Steps between looks for dead codes."""
    reseed_after_steps: int = 200
    """A code that won nothing for so many steps is dead and moves onto a current latent."""
    reseed_share: float = 0.8
    """Share of the run during which dead codes are re-seeded."""


@dataclass(frozen=True, kw_only=True)
class RelaxationConfig:
    """The discrete VAE of DALL-E, BEiT's tokenizer (Ramesh et al., 2021, appendix A.2)."""

    blocks: int = 2
    """Residual blocks per group; there are four groups in encoder and decoder."""
    n_init: int = 128
    """Channels that a token becomes in the decoder."""
    temperature: tuple[float, float] = (1.0, 1 / 16)
    """Of the Gumbel-softmax, at the start and at the end of its schedule (half a cosine)."""
    temperature_share: float = 0.05
    """Share of the run in which it falls; 150,000 of 3 million steps in the paper."""
    kl_weight: float = 6.6
    """Weight of KL(q || uniform) against the likelihood at the end of its schedule (half a cosine, from 0)."""
    kl_share: float = 1 / 600
    """Share of the run in which it grows; 5,000 of 3 million steps in the paper."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(RunConfig):
    """A run that trains a tokenizer."""

    objective: Literal["vq", "dvae"] = "vq"
    """`vq`: nearest codes, a `DiscreteVAE`. `dvae`: the paper's, Gumbel-softmax and the logit-Laplace likelihood, in
    DALL-E's layout."""
    vocab_size: int = 8192
    """Entries of the vocabulary."""
    hidden_dim: int = 32
    """Channels of the convolutions; 256 in the official tokenizer."""
    codebook_dim: int = 16
    """Dimensions of a code."""
    smooth_l1_beta: float = 0.1
    """Where the reconstruction loss turns from squared to absolute; pixels lie in [-1, 1]."""
    held_out_images: int = free(200)
    """Held-out built-in images to measure on (only where data.path is None)."""
    data: TokenizerDataConfig = TokenizerDataConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    dvae: RelaxationConfig = RelaxationConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "dvae" and self.data.channels not in (None, 3):
            raise ValueError(f"--objective dvae is made for 3 channels; for {self.data.channels} take --objective vq")
        if self.objective == "vq" and self.quantizer.live_codes > self.vocab_size:
            raise ValueError(
                f"--quantizer.live-codes {self.quantizer.live_codes} exceeds --vocab-size {self.vocab_size}"
            )


@dataclass(frozen=True)
class TokenizerBatch:
    """What a tokenizer is trained on in one step."""

    images: Tensor
    """float32 (b, C, S, S) in [0, 1], at the size of this step."""
    step: int

    def __len__(self) -> int:
        return len(self.images)


class TrainTokenizer(ImageTask):
    """Trains a `QuantizedAutoencoder`; leaves `tokenizer.safetensors` and pictures in the run folder."""

    name = "train_tokenizer"
    config: TrainTokenizerConfig

    def build(self, world: World) -> nn.Module:
        c, data = self.config, self.config.data
        model = self.make_model().to(world.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        source: ImageSource
        if data.path is None:
            source = builtin.builtin_source(data.cache_dir, data.builtin_images)
        else:
            source = open_training_source(data.path)
        self.total_steps = run_length(c, len(source))[1]
        if c.objective == "vq" and self.total_steps <= c.quantizer.autoencoder_steps:
            raise ValueError(
                f"--steps {self.total_steps} ends before there is a tokenizer: its codes begin after "
                f"--quantizer.autoencoder-steps {c.quantizer.autoencoder_steps}; raise --steps or lower that"
            )
        self.loader = PretrainLoader(
            source, BlockwiseMasking((1, 1), 0, mode="none"), CropSampler(), seed=c.seed,
            image_size=16,  # the view for the transformer has no use here
            token_image_size=max(data.view_sizes), device=world.device.type,
            bad_images=self.screen(source, data.max_bad_share), threads=data.threads, channels=data.channels,
            value_range=data.value_range, mean=(0.5,) * (data.channels or 3), std=(0.5,) * (data.channels or 3),
        )  # fmt: skip
        return model

    def make_model(self) -> nn.Module:
        """What is trained."""
        c = self.config
        sizes = c.hidden_dim, c.codebook_dim, c.quantizer.live_codes, c.quantizer.init_latents
        return QuantizedAutoencoder(*sizes, c.data.channels or 3)

    def tokenizer_of(self, model: nn.Module, step: int) -> Tokenizer | None:
        """The tokenizer that the model is after so many steps; None while there are no codes yet."""
        assert isinstance(model, QuantizedAutoencoder)
        return (
            None if step <= self.config.quantizer.autoencoder_steps else model.to_discrete_vae(self.config.vocab_size)
        )

    def parts_of(self, tokenizer: Tokenizer) -> dict[str, nn.Module]:
        """The files to export: their names without suffix, and what each holds."""
        return {"tokenizer": tokenizer}

    def prepare(self, batch: PretrainBatch, step: int) -> TokenizerBatch:
        """The tokenizer's views at the size of this step."""
        size = self.config.data.view_sizes[step % len(self.config.data.view_sizes)]
        images = _resized(batch.token_images, size).contiguous(memory_format=torch.channels_last)
        return TokenizerBatch(images, step)

    def loss(self, model: nn.Module, batch: TokenizerBatch, num_targets: Tensor) -> StepOutput:
        config = self.config
        reconstruction, commitment = model(batch.images, batch.step >= config.quantizer.autoencoder_steps)
        target = batch.images * 2 - 1
        per_image = F.smooth_l1_loss(reconstruction.float(), target, beta=config.smooth_l1_beta, reduction="none").mean(
            (1, 2, 3)
        )
        loss = (per_image + config.quantizer.commitment * commitment).sum() / num_targets
        error = (reconstruction.detach().float().clamp(-1, 1) - target) / 2
        return StepOutput(loss, error_sums(error) | {"commitment": commitment.detach().sum()})

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        assert isinstance(model, QuantizedAutoencoder)
        config, quantizer = self.config.quantizer, model.quantizer
        latents, ids = model.take_recent()
        if step < config.autoencoder_steps:
            quantizer.collect(latents)
            if step == config.autoencoder_steps - 1:
                quantizer.initialise(config.kmeans_rounds)
            return
        quantizer.update(latents, ids, config.decay)
        if step % config.reseed_every_steps == 0 and step < config.reseed_share * self.total_steps:
            quantizer.reseed(latents, config.reseed_after_steps)

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return error_metrics(sums) | {"commitment": sums["commitment"] / sums["images"]}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Error, perplexity and used codes on held-out built-in images; nothing while there are no codes yet."""
        config = self.config
        if config.data.path is not None or not config.held_out_images:
            return {}
        if (tokenizer := self.tokenizer_of(model, step)) is None:
            return {}
        result: dict[str, float] = {}
        for size in config.data.view_sizes:
            self.alive()
            values = reconstruction_metrics(tokenizer, held_out_images(config.held_out_images, size))
            result |= {f"held_out_{name}_{size}px": value for name, value in values.items()}
        return result

    def plan(self) -> dict[str, float]:
        sizes, model = self.config.data.view_sizes, self.make_model()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for size in sizes:
                model(torch.zeros(1, self.config.data.channels or 3, size, size), 1)  # quantised, or at temperature 1
        forward = counter.get_total_flops() / len(sizes)
        return {"flops_per_image": 3 * forward, "forward_flops_per_image": forward}

    def finish(self, model: nn.Module, folder: Path) -> None:
        if (tokenizer := self.tokenizer_of(model, self.total_steps)) is None:
            return
        metadata = {
            "command": shlex.join(["python", *sys.argv]),
            "data": builtin.NOTICE if self.config.data.path is None else str(self.config.data.path),
            "objective": self.config.objective,
            "live_codes": str(self.config.quantizer.live_codes),
            "measured": json.dumps(self.evaluate(model, self.total_steps)),
        }
        for name, part in self.parts_of(tokenizer).items():
            tensors = {key: tensor.cpu().contiguous() for key, tensor in part.state_dict().items()}
            write_weights(tensors, folder / f"{name}.safetensors", metadata)
        for size in self.config.data.view_sizes:
            self.alive()
            sheet = reconstruction_sheet(tokenizer, self.pictured(size))
            with naming(path := folder / f"reconstructions_{size}px.png"):
                sheet.save(path)

    def pictured(self, size: int) -> Tensor:
        """Sixteen images (16, C, size, size) to show: held-out built-in ones, or views of data of other channels."""
        if self.config.data.channels is None:
            return held_out_images(16, size)
        positions = np.arange(16, dtype=np.int64) % len(self.source)
        return _resized(next(iter(self.loader.batches([Request(0, positions)]))).token_images, size)


def error_sums(error: Tensor) -> dict[str, Tensor]:
    """Sums over the images of their mean absolute and squared errors (b, 3, S, S), and the number of images."""
    return {
        "images": torch.tensor(float(len(error)), device=error.device),
        "absolute_error": error.abs().mean((1, 2, 3)).sum(),
        "squared_error": error.square().mean((1, 2, 3)).sum(),
    }


def error_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Mean absolute error and peak signal-to-noise ratio from the totals of `error_sums`."""
    images = sums["images"]
    return {"mae": sums["absolute_error"] / images, "psnr_db": -10 * math.log10(sums["squared_error"] / images)}


@lru_cache(maxsize=4)
def held_out_images(count: int, size: int) -> Tensor:
    """Built-in images that no training set contains, float32 (count, 3, size, size) in [0, 1], drawn at 256 pixels."""
    drawn = np.stack([builtin.render(index, HELD_OUT_SEED, 256, 0.0) for index in range(count)])
    return _resized(torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255, size)


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def reconstruction_metrics(tokenizer: Tokenizer, images: Tensor) -> dict[str, float]:
    """Reconstruction error and use of the vocabulary on images (B, 3, H, W) in [0, 1].

    mae: mean absolute error; psnr_db: of the mean squared error over all pixels; perplexity: exp of the entropy of the
    tokens' histogram, at most the number of tokens; used_codes.
    """
    absolute = squared = 0.0
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.float64)
    device = next(tokenizer.parameters()).device
    for part in images.split(32):
        part = part.to(device)
        with torch.autocast(device.type, enabled=False):  # as it will be used, also inside a bf16 run
            ids = tokenizer.encode(part)
            error = (tokenizer.decode(ids) - part).double()
        absolute += float(error.abs().sum())
        squared += float(error.square().sum())
        counts += torch.bincount(ids.flatten().cpu(), minlength=tokenizer.vocab_size)
    share = counts[counts > 0] / counts.sum()
    return {
        "mae": absolute / images.numel(),
        "psnr_db": -10 * math.log10(squared / images.numel()),
        "perplexity": float(torch.exp(-(share * share.log()).sum())),
        "used_codes": float(len(share)),
    }


def reconstruction_sheet(tokenizer: Tokenizer, images: Tensor, columns: int = 8) -> Any:
    """A PIL image: rows of originals, each above its reconstructions."""
    images = images.to(next(tokenizer.parameters()).device)
    with torch.autocast(images.device.type, enabled=False):
        decoded = tokenizer.decode(tokenizer.encode(images))
    images, decoded = pictures.displayable(images, decoded)
    rows = [
        torch.cat(list(part), dim=2)
        for start in range(0, len(images), columns)
        for part in (images[start : start + columns], decoded[start : start + columns])
        if len(part) == columns
    ]
    return pictures.to_pil(torch.cat(rows, dim=1))
