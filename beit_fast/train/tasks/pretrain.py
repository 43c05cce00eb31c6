"""Masked image modelling as a task: views -> visual tokens -> BEiT -> loss (paper, section 2)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.data import builtin
from beit_fast.data.loader import NORMALIZATION, Request
from beit_fast.data.pretraining import PretrainBatch, PretrainLoader
from beit_fast.data.sampling import BlockwiseMasking, CropSampler
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import ImageSource, fingerprint, open_source
from beit_fast.data.token_store import TokenStore, store_bytes
from beit_fast.models import BeitConfig, BeitForMaskedImageModeling
from beit_fast.models.configs import Preset, Size
from beit_fast.tokenizers import Tokenizer, load_tokenizer
from beit_fast.train.config import RunConfig, free
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation import held_out
from beit_fast.train.task import StepOutput, Task
from beit_fast.train.tasks import run_pictures, token_cache
from beit_fast.train.tasks.token_cache import TokenSource


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and their views."""

    path: str | None = None
    """Folder of images (any depth; class folders need no naming), or tar shards: a folder of them, `/d/train-*.tar`,
    `/d/train-{000..146}.tar`. None: built-in images, rendered on this machine; a functional check, not ImageNet."""
    builtin_images: int = 512
    """Number of built-in images where there is no path."""
    builtin_size: int = 256
    """Side of a built-in image in pixels."""
    cache_dir: str | None = free(None)
    """Where built-in images are kept; None: $BEIT_FAST_CACHE, or ~/.cache/beit_fast."""
    normalization: Literal["imagenet", "half"] = "imagenet"
    """Mean and standard deviation of the model's view: ImageNet's (ImageNet-1k runs), or 0.5 (ImageNet-22k runs)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter."""
    view_cycle: int | None = None
    """Repeat crops, flips and colours every so many epochs (masks stay fresh), so that the tokenizer runs in the first
    of them only: its tokens are kept on disk, 396 bytes per image and epoch of the cycle. None: new views every epoch,
    as in the paper."""
    token_cache: str | None = free(None)
    """File of those tokens; None: tokens.cache in the run folder. `off` repeats the views and keeps no tokens."""
    max_bad_share: float = free(0.01)
    """Stop the run when more than this share of the images is unreadable; they are listed in bad_files.tsv."""
    decoder: Literal["auto", "dali", "dali-gpu", "pil"] = free("auto")
    """Who decodes JPEGs."""
    threads: int | None = free(None)
    """Threads that make views; None: the cores of this process, at most 8."""
    prefetch: int = free(2)
    """Batches made ahead."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The BEiT to train."""

    size: Size = "base"
    """Width, depth and heads."""
    preset: Preset = "plus"
    """`plus`: LayerScale and a shared relative position bias (the released weights; paper, appendix A). `plain`:
    absolute position embedding only (the paper's main tables)."""
    image_size: int = 224
    """Side of the model's view in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block; linear from 0 at the first."""
    width: int | None = None
    """In place of the size's token width."""
    depth: int | None = None
    """In place of the size's number of blocks."""
    num_heads: int | None = None
    """In place of the size's number of heads."""
    use_abs_pos_emb: bool | None = None
    """In place of the preset's choice of an absolute position embedding."""
    layer_scale_init: float | None = None
    """In place of the preset's LayerScale start value; 0 leaves LayerScale out."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    grad_checkpointing: bool = free(False)
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def architecture(self, vocab_size: int, **more: Any) -> BeitConfig:
        """The model's configuration for a tokenizer with `vocab_size` tokens; ValueError where it cannot be."""
        overrides: dict[str, Any] = more | {
            name: value
            for name in ("width", "depth", "num_heads", "use_abs_pos_emb")
            if (value := getattr(self, name)) is not None
        }
        if self.layer_scale_init is not None:
            overrides["layer_scale_init"] = self.layer_scale_init or None
        return BeitConfig.from_preset(
            self.size, self.preset, image_size=self.image_size, patch_size=self.patch_size, vocab_size=vocab_size,
            drop_path_rate=self.drop_path_rate, init_std=self.init_std, **overrides,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which patches are hidden (paper, section 2.3 and algorithm 1)."""

    num_masked: int = 75
    """Masked patches per image; about 40 % in the paper."""
    mode: Literal["exact", "official", "random", "none"] = "exact"
    """`exact`: blockwise, always `num_masked`. `official`: blockwise, stops a patch or two short in a third of the
    images. Ablations of table 4: `random`, without blocks; `none` hides nothing, which needs --objective.recover all.
    """
    min_num_patches: int = 16
    """Smallest block, in patches."""
    min_aspect: float = 0.3
    """Smallest ratio of a block's sides; the largest is its inverse."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is predicted where; all but the defaults are ablations of table 4."""

    target: Literal["visual_tokens", "pixels"] = "visual_tokens"
    """`pixels`: regress the normalised pixels of patches by their mean squared error, without a tokenizer."""
    recover: Literal["masked", "all"] = "masked"
    """`all`: predict visible patches as well as hidden ones."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What turns images into visual tokens (paper, section 2.1)."""

    name: str = "dalle"
    """`dalle`: OpenAI's dVAE, as in the paper (fetched at first use, or put there by hand). `demo`: the small one that
    comes along. Or a file: encoder.pkl, .safetensors, .pth, .bin."""
    sha256: str | None = None
    """Demand this hash of the file."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of its convolutions, all but the output one, which is fp32 always. `auto`: fp32 on the CPU, fp16 on a GPU, as the
    official code runs DALL-E's. Rounding moves a token where two are nearly equally probable; bf16 moves more of them
    (of the demo tokenizer's on built-in images, 1.2 %)."""

    def dtype(self, device: torch.device) -> torch.dtype:
        """What `precision` is on this device."""
        name = self.precision
        if name == "auto":
            name = "fp32" if device.type == "cpu" else "fp16"
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out images: masked loss, the entropy it has to beat, and the loss without the right context."""

    images: int = free(0)
    """Number of held-out images; 0 evaluates nothing."""
    path: str | None = free(None)
    """Folder or shards of held-out images; None: built-in images of another seed, without photographs."""
    pictures: int = free(4)
    """Held-out images to draw at every evaluation: masked, decoded from predicted tokens, attended to; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """BEiT pre-training."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


class MaskedImageModeling(Task):
    """Predict the visual tokens of masked patches from the others."""

    name = "pretrain"
    can_shard = True
    can_capture = True

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.predict_all = config.objective.recover == "all"
        self.tokenizer: Tokenizer | None = None
        self.views: PretrainLoader | None = None
        self.held_out: PretrainLoader | None = None
        self.bad_images: BadImages | None = None
        self.token_store: TokenStore | None = None
        self.tokens: TokenSource | None = None

    def build(self, config: RunConfig, world: World) -> nn.Module:
        c, data = self.config, self.config.data
        masking = self.open_tokenizer(world)
        source = (
            open_source(data.path)
            if data.path is not None
            else builtin.builtin_source(data.cache_dir, data.builtin_images, c.seed, data.builtin_size)
        )
        self.source = source
        self.bad_images = BadImages(
            len(source), c.output_dir / "bad_files.tsv" if c.output_dir.is_dir() else None, data.max_bad_share
        )
        if self.tokenizer is not None:
            self.token_store = token_cache.open_store(c, self.tokenizer, source, masking, world.device)
            self.tokens = TokenSource(self.tokenizer, self.token_store)
        self.views = self._views(source, masking, self.bad_images, data.view_cycle, self.token_store)
        if c.evaluation.images:
            self.held_out = self.open_held_out(masking)
        torch.manual_seed(c.seed)  # whatever was drawn above, the initial weights are those of the seed
        model = BeitForMaskedImageModeling(self.architecture())
        model.set_grad_checkpointing(c.model.grad_checkpointing)
        return model.to(world.device)

    def open_tokenizer(self, world: World, decoder: bool = False) -> BlockwiseMasking:
        """What the objective needs: the tokenizer, where there is one (with `decoder`, so that it decodes), and the
        masks.
        """
        c, self.world = self.config, world
        if c.masking.mode == "none" and not self.predict_all:
            raise ValueError("--masking.mode none leaves nothing to predict; it needs --objective.recover all")
        if c.masking.mode == "official" and c.cuda_graph:
            raise ValueError("--cuda-graph needs masks of one size, which --masking.mode official does not make: exact")
        if c.objective.target == "visual_tokens":
            self.tokenizer = load_tokenizer(
                c.tokenizer.name,
                sha256=c.tokenizer.sha256,
                device=world.device,
                dtype=c.tokenizer.dtype(world.device),
                decoder=decoder,
            )
        side, mask = c.model.image_size // c.model.patch_size, c.masking
        return BlockwiseMasking((side, side), mask.num_masked, mask.mode, mask.min_num_patches, None, mask.min_aspect)

    def open_held_out(self, masking: BlockwiseMasking) -> PretrainLoader:
        """Views of the held-out images."""
        c, data = self.config, self.config.data
        held_out = (
            open_source(c.evaluation.path)
            if c.evaluation.path is not None
            else builtin.builtin_source(
                data.cache_dir, c.evaluation.images, c.seed + 1, data.builtin_size, photograph_share=0.0
            )
        )
        return self._views(held_out, masking, BadImages(len(held_out), None, data.max_bad_share))

    def architecture(self) -> BeitConfig:
        """The model's; asked after the tokenizer is open."""
        vocab_size = BeitConfig.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        return self.config.model.architecture(vocab_size, mim_target=self.config.objective.target)

    def _views(
        self,
        source: ImageSource,
        masking: BlockwiseMasking,
        bad: BadImages,
        view_cycle: int | None = None,
        store: TokenStore | None = None,
    ) -> PretrainLoader:
        data = self.config.data
        mean, std = NORMALIZATION[data.normalization]
        jitter = data.jitter
        sampling = CropSampler(data.scale, data.ratio, data.flip_probability, jitter, jitter, jitter)
        stride = 1 if self.tokenizer is None else self.tokenizer.stride
        return PretrainLoader(
            source, masking, sampling, seed=self.config.seed, image_size=self.config.model.image_size,
            token_image_size=masking.grid[0] * stride, mean=mean, std=std, device=self.world.device,
            decoder=data.decoder, bad_images=bad, threads=data.threads, prefetch=data.prefetch,
            view_cycle=view_cycle, token_store=store,
        )  # fmt: skip

    def num_samples(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, Any]:
        tokenizer = {} if self.tokenizer is None else {"tokenizer_sha256": self.tokenizer.sha256}
        return {"data": fingerprint(self.source), **tokenizer}

    def batches(self, requests: Iterator[Request]) -> Iterator[PretrainBatch]:
        assert self.views is not None
        return self.views.batches(requests)

    def num_targets(self, batch: PretrainBatch) -> Tensor | int:
        return batch.mask.numel() if self.predict_all else len(batch.masked_indices)

    def prepare(self, batch: PretrainBatch, step: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """images, mask, the visual tokens to predict (int64 (M,) or (B, h, w); none where pixels are), keys, rows."""
        tokens = None if self.tokens is None else self.tokens.of(batch, self.predict_all)
        return batch.images, batch.mask, tokens, batch.sample_keys, batch.masked_indices

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor], num_targets: Tensor
    ) -> StepOutput:
        images, mask, tokens, sample_keys, masked_indices = batch
        output = model(images, mask, tokens, sample_keys, num_targets, masked_indices, self.predict_all)
        masked = torch.full((), output.num_masked, dtype=torch.float64, device=images.device)
        return StepOutput(output.loss, {"num_correct": output.num_correct, "num_masked": masked})

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        if self.tokenizer is None:
            return {}
        return {"accuracy": sums["num_correct"] / sums["num_masked"]}

    def counters(self) -> dict[str, float]:
        counts = {} if self.bad_images is None else {"bad_images": float(len(self.bad_images))}
        if self.token_store is not None:
            counts["damaged_token_records"] = self.token_store.damaged_records
        return counts

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Held-out images under the training views and fixed masks; see `held_out.measure`."""
        if self.held_out is None:
            return {}
        assert isinstance(model, BeitForMaskedImageModeling)
        images, size = self.config.evaluation.images, self.config.batch_per_device
        found, histogram = held_out.measure(model, self.tokenizer, self.held_out, images, size, self.predict_all)
        count = min(self.config.evaluation.pictures, images)
        if count and self.world.is_main and self.config.output_dir.is_dir():
            batch = held_out.first(self.held_out, count)
            norm = NORMALIZATION[self.config.data.normalization]
            run_pictures.draw(self.config.output_dir, step, model, self.tokenizer, batch, norm)
            run_pictures.write_histogram(self.config.output_dir, histogram, images)
        return found

    def plan(self, config: RunConfig) -> dict[str, float]:
        architecture = self.architecture()
        targets = architecture.num_patches if self.predict_all else self.config.masking.num_masked
        forward = 2.0 * multiply_adds(architecture, targets)
        if self.tokenizer is None:
            return {"flops_per_image": 3 * forward}
        side = self.config.model.image_size // self.config.model.patch_size * self.tokenizer.stride
        with FlopCounterMode(display=False) as counter:
            self.tokenizer.encode(torch.zeros(1, 3, side, side, device=self.world.device))
        numbers = {"flops_per_image": 3 * forward, "tokenizer_flops_per_image": float(counter.get_total_flops())}
        data = self.config.data
        if data.view_cycle is not None and data.token_cache != "off":
            numbers["prepared_epochs"] = data.view_cycle
            numbers["token_cache_bytes"] = store_bytes(len(self.source), (side // self.tokenizer.stride) ** 2,
                                                       data.view_cycle)  # fmt: skip
        return numbers

    def close(self) -> None:
        for views in (self.views, self.held_out):
            if views is not None:
                views.close()
        if self.token_store is not None and self.tokens is not None:
            self.tokens.flush()
            self.token_store.close()

    def finish(self, model: nn.Module, run_dir: Path) -> None:
        if self.bad_images is not None and len(self.bad_images):
            print(f"{len(self.bad_images)} images could not be used: {run_dir / 'bad_files.tsv'}", flush=True)


def multiply_adds(config: BeitConfig, num_masked: int) -> float:
    """Multiply-adds of one image's forward pass: patches, blocks on all tokens, head on the masked ones.

    18.03e9 for BEiT-B with 75 masked patches. What this implementation saves in the last block is not subtracted, so
    that throughputs compare with others'.
    """
    n, d = config.num_patches + 1, config.width
    outputs = config.vocab_size if config.mim_target == "visual_tokens" else config.in_chans * config.patch_size**2
    block = (4 + 2 * config.mlp_ratio) * n * d * d + 2 * n * n * d
    patches = config.num_patches * d * config.in_chans * config.patch_size**2
    return patches + config.depth * block + num_masked * d * outputs
