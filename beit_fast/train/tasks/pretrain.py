"""Masked image modelling as a task: views -> visual tokens -> BEiT -> loss (paper, section 2)."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.data import builtin
from beit_fast.data.pretraining import PretrainBatch, PretrainLoader, resolve_decoder
from beit_fast.data.reading import common_kind
from beit_fast.data.sampling import BlockwiseMasking, CropSampler
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import ImageSource, fingerprint, open_source, open_training_source
from beit_fast.data.sources.writing import write_text
from beit_fast.data.token_store import TokenStore, store_bytes
from beit_fast.models import BeitConfig, BeitForMaskedImageModeling
from beit_fast.models.mim import pretrained_backbone
from beit_fast.tokenizers import Tokenizer, load_tokenizer
from beit_fast.tokenizers.load import untrained
from beit_fast.train.config import RunConfig, at_least_1, free, local
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation import held_out, run_pictures
from beit_fast.train.evaluation.knn import KnnEvaluation
from beit_fast.train.optim import decay_groups
from beit_fast.train.task import StepOutput
from beit_fast.train.tasks.adapters import LoraConfig, add_lora, freeze, merged
from beit_fast.train.tasks.images import ImageDataConfig, ImageTask
from beit_fast.train.tasks.model import MaskingConfig, ModelConfig, ObjectiveConfig, TokenizerConfig, multiply_adds
from beit_fast.train.tasks.start import StartingWeights, budget_lines, check_channels, plain_size
from beit_fast.train.tasks.token_cache import TokenSource, open_store


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImageDataConfig):
    """Images and their views."""

    path: str | None = local(None, free=False)
    """Folder of images (any depth; class folders need no naming), or tar shards: a folder of them, `/d/train-*.tar`,
    `/d/train-{000..146}.tar`. None: built-in images, rendered on this machine; a functional check, not ImageNet."""
    builtin_images: int = 512
    """Number of built-in images where there is no path."""
    builtin_size: int = 256
    """Side of a built-in image in pixels."""
    normalization: str = "imagenet"
    """Mean and standard deviation of the model's view: `imagenet` (ImageNet-1k runs), `half`, that is 0.5 (ImageNet-22k
    runs), or a file that `beit-fast stats` wrote."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop; about that of the view, where it is not square."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter; saturation is left out where there are not 3 channels."""
    view_cycle: int | None = None
    """Repeat crops, flips and colours every so many epochs (masks stay fresh), so that the tokenizer runs in the first
    of them only: its tokens are kept on disk, 396 bytes per image and epoch of the cycle. None: new views every epoch,
    as in the paper."""
    token_cache: str | None = local(None)
    """File of those tokens; None: tokens.cache in the run folder. `off` repeats the views and keeps no tokens."""
    one_view: bool = False
    """The tokenizer sees the pixels of the model's view, as in BEiT v2, not a view of its own; its tokens must be as
    large as the model's patches."""
    decoder: Literal["auto", "dali", "dali-gpu", "pil"] = local("auto")  # type: ignore[assignment]
    """Who decodes JPEGs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.view_cycle is None and self.token_cache not in (None, "off"):
            raise ValueError("--data.token-cache needs --data.view-cycle: only views that repeat have tokens to keep")
        at_least_1("--data.view-cycle", self.view_cycle)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out images: masked loss, the entropy it has to beat, and the loss without the right context."""

    images: int = free(0)
    """Number of held-out images, at most as many as there are; 0 evaluates nothing."""
    path: str | None = local(None)
    """Folder or shards of held-out images; None: built-in images of another seed, without photographs."""
    knn: str | None = free(None)
    """Labelled images, a folder with `train` and `val` in it: measure what k-NN and a linear classifier make of the
    mean patch tokens, before the first step (of the weights that the run starts from) and at every evaluation."""
    pictures: int = free(4)
    """Held-out images to draw at every evaluation: masked, decoded from predicted tokens, attended to; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """BEiT pre-training."""

    weights: str | None = local(None, free=False)
    """Pre-trained weights to go on from: a run folder, a file (official, timm, transformers), a name on the hub; model,
    image size and normalisation follow them. None: random ones."""
    fine_tuned_weights: bool = False
    """Go on from weights that were fine-tuned to classify, too."""
    defaults_by_images_seen: bool = False
    """With --weights: take the learning rate, its warm-up and --layer-decay, where they are not given, from a table by
    the number of images that the run sees (--steps times --batch-size)."""
    layer_decay: float | None = None
    """Learning rate of a layer over that of the layer above it; None: all layers learn alike."""
    frozen_blocks: int = 0
    """Blocks, from the first on, that keep their weights, and with them the patch and position embeddings."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None and (self.frozen_blocks or self.lora.rank):
            raise ValueError("--frozen-blocks and --lora.rank keep weights as they are; give --weights")
        if self.data.channels is not None and self.evaluation.images and self.evaluation.path is None:
            raise ValueError("--evaluation.images: built-in images are RGB of 8 bits; give --evaluation.path as well")
        if self.masking.mode == "none" and self.objective.recover != "all":
            raise ValueError("--masking.mode none leaves nothing to predict; it needs --objective.recover all")
        if self.masking.mode == "official" and self.cuda_graph:
            raise ValueError("--cuda-graph needs masks of one size, which --masking.mode official does not make: exact")

    def token_cache_path(self) -> Path | None:
        """The file of the tokens of repeated views; None where none are kept."""
        if self.data.view_cycle is None or self.data.token_cache == "off":
            return None
        named = self.data.token_cache
        return self.output_dir / "tokens.cache" if named is None else Path(named).expanduser()


class MaskedImageModeling(ImageTask):
    """Predict the visual tokens of masked patches from the others."""

    name = "pretrain"
    can_shard = True
    can_capture = True
    config: PretrainConfig

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.predict_all = config.objective.recover == "all"
        self.tokenizer: Tokenizer | None = None
        self.held_out: PretrainLoader | None = None
        self.knn: KnnEvaluation | None = None
        self.token_store: TokenStore | None = None
        self.tokens: TokenSource | None = None
        self.start: StartingWeights | None = None

    def evaluates_start(self) -> bool:
        return self.config.evaluation.knn is not None

    def build(self, world: World) -> nn.Module:
        c, data = self.config, self.config.data
        if data.path is not None:  # before the tokenizer, which may have to be fetched
            source = open_training_source(data.path)
        else:
            source = builtin.builtin_source(data.cache_dir, data.builtin_images, c.seed, data.builtin_size)
        if data.channels is not None:
            common_kind(source, data.channels, data.value_range)
        if c.weights is not None:
            self.start = StartingWeights(c.weights, c.fine_tuned_weights)
        masking = self.open_tokenizer(world)
        bad_images = self.screen(source, data.max_bad_share)
        if self.tokenizer is not None:
            self.token_store = self.open_token_store(self.tokenizer, masking)
            self.tokens = TokenSource(self.tokenizer, self.token_store)
        self.loader = self._loader(source, masking, bad_images, data.view_cycle, self.token_store)
        if c.evaluation.images:
            self.held_out = self.open_held_out(masking)
            self.others.append(self.held_out)
        if c.evaluation.knn is not None:
            options = data.loader_options(world.device) | {"decoder": "auto"}
            self.knn = KnnEvaluation(c.evaluation.knn, c.model.image_size, data.max_bad_share, probe=True, **options)
            self.others += self.knn.views
        torch.manual_seed(c.seed)  # whatever was drawn above, the initial weights are those of the seed
        model = BeitForMaskedImageModeling(self.architecture())
        if self.start is not None:
            self.start.load(model, self.tokenizer, verbose=world.is_main)
        freeze(model, c.frozen_blocks)
        add_lora(model, c.lora)
        model.set_grad_checkpointing(c.model.grad_checkpointing)
        return model.to(world.device)

    def open_tokenizer(self, world: World, decoder: bool = False) -> BlockwiseMasking:
        """Load the objective's tokenizer, if any (with `decoder`, so that it decodes); returns the masking."""
        c, self.world = self.config, world
        if c.objective.target == "visual_tokens":
            dtype = c.tokenizer.dtype(world.device)
            if c.dry_run and c.tokenizer.name in ("dalle", "vqkd"):
                self.tokenizer = untrained(c.tokenizer.name, world.device, dtype)
            else:
                self.tokenizer = load_tokenizer(
                    c.tokenizer.name, sha256=c.tokenizer.sha256, device=world.device, dtype=dtype, decoder=decoder
                )
            check_channels(self.tokenizer, c.data.in_chans, c.tokenizer.name)
            if c.data.one_view and self.tokenizer.stride != c.model.patch_size:
                raise ValueError(
                    f"--data.one-view: the tokens of {c.tokenizer.name} are {self.tokenizer.stride} pixels wide, the "
                    f"patches {c.model.patch_size}; take a tokenizer of that size (`vqkd`: 16), or --no-data.one-view"
                )
        return c.masking.of(c.model.grid)

    def open_token_store(self, tokenizer: Tokenizer, masking: BlockwiseMasking) -> TokenStore | None:
        """The store of this run's tokens; None where none are kept."""
        c, data = self.config, self.config.data
        path = c.token_cache_path()
        if path is None or data.view_cycle is None:
            return None
        settings = {  # all that the tokens of sample i in epoch e of the cycle depend on
            "data": fingerprint(self.source),
            "builtin_size": data.builtin_size if data.path is None else None,
            "seed": c.seed,
            "scale": data.scale,
            "ratio": data.ratio,
            "flip_probability": data.flip_probability,
            "jitter": data.jitter,
            "image_size": c.model.image_size,  # contrast is about the mean gray of the model's view
            "token_image_size": plain_size(self._token_image_size(masking)),
            "tokenizer": tokenizer.name,
            "tokenizer_sha256": tokenizer.sha256,
            "decoder": resolve_decoder(data.decoder, self.world.device),
        }
        if c.tokenizer.dtype(self.world.device) != torch.float32:
            settings["tokenizer_precision"] = str(c.tokenizer.dtype(self.world.device)).removeprefix("torch.")
        if data.one_view:
            settings["one_view"] = True
        if data.value_range is not None:
            settings["value_range"] = data.value_range
        if data.channels is not None:
            kind = common_kind(self.source, data.channels, data.value_range)
            settings |= {"channels": kind.channels, "depth": kind.depth}
        num_tokens = masking.grid[0] * masking.grid[1]
        return open_store(path, tokenizer, len(self.source), num_tokens, data.view_cycle, settings, c.dry_run)

    def open_held_out(self, masking: BlockwiseMasking) -> PretrainLoader:
        """Views of the held-out images."""
        c, data = self.config, self.config.data
        if c.evaluation.path is not None:
            source = open_source(c.evaluation.path)
        else:
            source = builtin.builtin_source(
                data.cache_dir, c.evaluation.images, c.seed + 1, data.builtin_size, photograph_share=0.0
            )
        return self._loader(source, masking, BadImages(len(source), None, data.max_bad_share))

    def architecture(self) -> BeitConfig:
        """The model's configuration, once the tokenizer is open."""
        vocab_size = BeitConfig.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        tables = {} if self.start is None else self.start.tables
        objective = self.config.objective
        return self.config.model.architecture(
            vocab_size, mim_target=objective.target, num_classes=0, in_chans=self.config.data.in_chans,
            head_layers=objective.head_layers, early_layers=objective.early_layers, **tables,
        )  # fmt: skip

    def _token_image_size(self, masking: BlockwiseMasking) -> tuple[int, int]:
        stride = 1 if self.tokenizer is None else self.tokenizer.stride
        return masking.grid[0] * stride, masking.grid[1] * stride

    def _loader(
        self, source: ImageSource, masking: BlockwiseMasking, bad_images: BadImages, view_cycle: int | None = None,
        store: TokenStore | None = None,
    ) -> PretrainLoader:  # fmt: skip
        data, jitter = self.config.data, self.config.data.jitter
        height, width = self.config.model.view
        ratio = (data.ratio[0] * width / height, data.ratio[1] * width / height)  # about that of the view
        sampling = CropSampler(data.scale, ratio, data.flip_probability, jitter, jitter, jitter)
        return PretrainLoader(
            source, masking, sampling, seed=self.config.seed, image_size=self.config.model.image_size,
            token_image_size=None if data.one_view else self._token_image_size(masking), bad_images=bad_images,
            view_cycle=view_cycle, token_store=store, **data.loader_options(self.world.device),
        )  # fmt: skip

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, BeitForMaskedImageModeling)
        return [*model.extra_layers()[:-1], *model.layers()]  # the last ones of both heads are read in two pieces

    def frozen(self) -> list[nn.Module]:
        return [] if self.tokenizer is None else [self.tokenizer]

    def identity(self) -> dict[str, Any]:
        tokenizer = {} if self.tokenizer is None else {"tokenizer_sha256": self.tokenizer.sha256}
        return super().identity() | tokenizer

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(model, weight_decay, self.config.layer_decay, self.architecture().depth)

    def num_targets(self, batch: PretrainBatch) -> Tensor | int:
        return batch.mask.numel() if self.predict_all else len(batch.masked_indices)

    def prepare(self, batch: PretrainBatch, step: int) -> PretrainBatch:
        """The batch with its visual tokens (none for pixels), without what they were made of."""
        tokens = None if self.tokens is None else self.tokens.of(batch, self.predict_all)
        none = batch.token_images[:0]
        return dataclasses.replace(batch, visual_tokens=tokens, token_images=none, known_tokens=None, unknown=None)

    def loss(self, model: nn.Module, batch: PretrainBatch, num_targets: Tensor) -> StepOutput:
        output = model(
            batch.images, batch.mask, batch.visual_tokens, sample_keys=batch.sample_keys, num_targets=num_targets,
            masked_indices=batch.masked_indices, predict_all=self.predict_all,
        )  # fmt: skip
        num_masked = torch.full((), output.num_masked, dtype=torch.float64, device=batch.images.device)
        sums = {"num_correct": output.num_correct, "num_masked": num_masked}
        if output.extra_num_correct is not None:
            sums["extra_num_correct"] = output.extra_num_correct
        return StepOutput(output.loss, sums)

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        if self.tokenizer is None:
            return {}
        names = {"accuracy": "num_correct", "extra_accuracy": "extra_num_correct"}
        return {name: sums[count] / sums["num_masked"] for name, count in names.items() if count in sums}

    def counters(self) -> dict[str, float]:
        store = self.token_store
        return super().counters() | ({} if store is None else {"damaged_token_records": store.damaged_records})

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Held-out images under the training views and fixed masks; see `held_out.evaluate`."""
        assert isinstance(model, BeitForMaskedImageModeling)
        neighbours = {}
        if self.knn is not None:
            neighbours = self.knn.evaluate(pretrained_backbone(merged(model)), self.world, self.config.batch_per_device)
        if self.held_out is None:
            return neighbours
        images, size = min(self.config.evaluation.images, len(self.held_out.source)), self.config.batch_per_device
        values, histogram = held_out.evaluate(
            model, self.tokenizer, self.held_out, images, size, self.predict_all, self.alive
        )
        count = min(self.config.evaluation.pictures, images)
        if count and self.world.is_main and self.config.output_dir.is_dir():
            batch = held_out.first(self.held_out, count)
            norm = self.config.data.mean_and_std()
            run_pictures.draw(self.config.output_dir, step, model, self.tokenizer, batch, norm)
            run_pictures.write_histogram(self.config.output_dir, histogram, images)
        return values | neighbours

    def finish(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, BeitForMaskedImageModeling)
        data = self.config.data
        merged(model).save_pretrained(folder / "model")
        preprocessing = {
            "image_size": self.config.model.image_size, **data.description(),
            "tokenizer": self.config.tokenizer.name,
            "tokenizer_sha256": None if self.tokenizer is None else self.tokenizer.sha256,
            "data": builtin.NOTICE if data.path is None else data.path,
        }  # fmt: skip
        write_text(folder / "model" / "preprocessing.json", json.dumps(preprocessing, indent=1) + "\n")

    def plan(self) -> dict[str, float]:
        architecture = self.architecture()
        masking = self.config.masking.of(architecture.grid)
        targets = architecture.num_patches if self.predict_all else masking.num_masked
        numbers = {"flops_per_image": 3 * 2.0 * multiply_adds(architecture, targets)}
        if self.tokenizer is None:
            return numbers
        size = (1, self.tokenizer.channels, *self._token_image_size(masking))
        with FlopCounterMode(display=False) as counter:
            self.tokenizer.encode(torch.zeros(size, device=self.world.device))
        numbers["tokenizer_flops_per_image"] = float(counter.get_total_flops())
        cycle = self.config.data.view_cycle
        if cycle is not None and self.config.token_cache_path() is not None:
            numbers |= {
                "prepared_epochs": cycle,
                "token_cache_bytes": store_bytes(len(self.source), architecture.num_patches, cycle),
            }
        return numbers

    def plan_lines(self) -> list[tuple[str, str]]:
        return budget_lines(self.config, len(self.source))

    def close(self) -> None:
        super().close()
        if self.token_store is not None and self.tokens is not None:
            self.tokens.flush()
            self.token_store.close()
