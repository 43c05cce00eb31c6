"""What the evidence programs train: rows, sets of scenes, and the configuration of every run (PROTOCOL.md).

Drawn scenes of 64 x 64 pixels, 24 classes, and a BEiT of width 128 and depth 4: a functional check of the method, not
ImageNet. A row differs from the first in what it names and in nothing else.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from beit_fast.data.labelled import builtin_labelled
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.tasks.finetune import AugmentConfig, ClassifierModelConfig, FinetuneConfig, LabelledDataConfig
from beit_fast.train.tasks.pretrain import (
    DataConfig,
    EvaluationConfig,
    MaskingConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
)
from beit_fast.train.tasks.probe import ProbeConfig

Labels = Literal["scenes", "hues"]
SHAPE: dict[str, Any] = {
    "size": "tiny", "width": 128, "depth": 4, "num_heads": 4, "image_size": 64, "patch_size": 8, "drop_path_rate": 0.0,
    "init_std": 0.05, "use_abs_pos_emb": True, "layer_scale_init": 0.0
}  # fmt: skip
"""The model: absolute positions and a shared relative position bias. For width 128 an initial standard deviation of
0.05 is what 0.02 is for 768."""
UNLABELLED_SEED, HELD_OUT_SEED = 7, 8
TRAINING_SEED = 1000
"""Labelled training scenes of seed s are the built-in set 1000 + s."""
TUNING_SEED = 100
TUNING_VALIDATION_SEED, TEST_SEED = 3_000_029, 3_000_017
"""Sets of scenes on which rates are chosen, and on which the table is measured; nothing is trained on either."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    """As the paper names it."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted fields of the pre-training that differ from the first row; `model.*` differ in fine-tuning too."""
    length: float = 1.0
    """Factor on the steps of pre-training; 0 starts from random weights."""
    finetune_length: float = 1.0
    """Factor on the steps of fine-tuning."""
    paper: float | None = None
    """Difference to the first row in the paper, in points of top-1 on ImageNet-1k."""
    hues: bool = False
    """Whether it is fine-tuned on the hues, too."""


BASE = "blockwise_tokens"
ROWS: dict[str, Row] = {
    BASE: Row("BEiT: blockwise masks, visual tokens", hues=True),
    "pixels": Row("pixels in place of visual tokens", {"objective.target": "pixels"}, paper=81.04 - 82.86),
    "scratch": Row("from scratch", length=0, paper=81.8 - 82.86, hues=True),
    "scratch_long": Row("from scratch, three times the steps", length=0, finetune_length=3, hues=True),
    "random_mask": Row("random masks", {"masking.mode": "random"}, paper=82.77 - 82.86),
    "recover_all": Row("all tokens recovered", {"objective.recover": "all"}, paper=82.59 - 82.86),
    "shorter": Row("3/8 of the steps", length=3 / 8, paper=82.86 - 83.19),
    "layer_scale": Row("LayerScale", {"model.layer_scale_init": 0.1}, paper=83.00 - 82.86),
    "no_bias": Row("without relative position bias", {"model.preset": "plain"}, paper=83.00 - 83.22),
}
"""The paper's differences are those of tables 1, 4 and 5; its own first row has no relative position bias."""
TIERS: tuple[tuple[str, ...], ...] = (
    (BASE, "pixels", "scratch", "scratch_long"),
    ("random_mask", "recover_all", "shorter"),
    ("layer_scale", "no_bias"),
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The paper's orderings on drawn scenes, with a small BEiT."""

    output: Path = Path("runs/evidence")
    """Run folders, sets of scenes, record, table and picture."""
    budget_hours: float | None = None
    """Start nothing that would end later than this; None: everything."""
    plan: bool = False
    """Say what there is to do and how long it would take, and do nothing."""
    tiers: int = 1
    """Groups of rows to run, one after the other: 1 tokens, pixels, from scratch; 2 masks, targets, schedule;
    3 LayerScale, relative position bias."""
    seeds: int = 3
    """Pre-trainings per row. A seed also draws the labelled scenes, the order and the initial weights."""
    unlabelled_images: int = 16_000
    """Scenes for pre-training."""
    held_out: int = 600
    """Scenes on which pre-training is measured."""
    pretrain_steps: int = 4000
    """Steps of pre-training, 32 scenes each."""
    labelled_images: int = 2000
    """Labelled training scenes of a seed."""
    probe_images: int = 16_000
    """Labelled scenes of a seed for the probes, which train few numbers and need many scenes."""
    tuning_images: int = 2000
    """Scenes on which rates are chosen."""
    test_images: int = 6000
    """Scenes on which the table is measured: a standard error of at most 0.65 points."""
    finetune_steps: int = 600
    """Steps of fine-tuning, 32 scenes each."""
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Learning rates that fine-tuning and training from scratch begin to choose from."""
    layer_decay: float = 0.85
    """Of fine-tuning; from scratch all layers learn alike."""
    probe_rates: tuple[float, ...] = (1e-2, 2e-2, 4e-2)
    """Learning rates that the probes begin to choose from."""
    probe_epochs: int = 20
    """Epochs of the probes."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of all runs."""
    cache_dir: str | None = None
    """Where scenes are kept."""
    device: str = "auto"
    """Where to run."""
    threads: int = 1
    """Threads that make views."""

    def settings(self) -> dict[str, Any]:
        """What a record must agree on to be continued."""
        free = {"output", "budget_hours", "plan", "tiers", "seeds", "cache_dir", "device", "threads"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def scene_folder(protocol: Protocol, labels: Labels, seed: int, count: int) -> Path:
    """A folder with the first `count` scenes of a set, one folder a class, as links to the cached files."""
    folder = protocol.output / "sets" / f"{labels}_seed{seed}_{count}"
    if not folder.is_dir():
        images = builtin_labelled(labels, protocol.cache_dir, count, 64, True, seed)
        partial = folder.with_name(f"{folder.name}.partial")
        for index, label in enumerate(images.labels.tolist()):
            target = Path(images.source.name(index)).resolve()
            link = partial / f"{label:02d} {images.classes[label]}" / target.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(target)
        partial.rename(folder)
    return folder


def hashes(folder: Path) -> set[str]:
    """SHA-256 of every image file in a folder."""
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("**/*.jpg")}


def evaluation_folder(protocol: Protocol, labels: Labels) -> Path:
    """The scenes on which the table is measured."""
    return scene_folder(protocol, labels, TEST_SEED, protocol.test_images)


def check_disjoint(protocol: Protocol, folder: Path, labels: Labels) -> Path:
    """`folder`; ValueError where it holds an image of the test set."""
    if shared := hashes(folder) & hashes(evaluation_folder(protocol, labels)):
        raise ValueError(f"{len(shared)} images of {folder} are in the test set {evaluation_folder(protocol, labels)}")
    return folder


def common(protocol: Protocol, folder: str, every: int) -> dict[str, Any]:
    """What all runs share; a line of metrics `every` so many steps."""
    return {
        "output_dir": protocol.output / "runs" / folder, "device": protocol.device, "precision": protocol.precision,
        "log": LogConfig(every_steps=every, progress="lines"), "checkpoint": CheckpointConfig(every_steps=250)
    }  # fmt: skip


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` with dotted fields replaced; TypeError or AttributeError where there is no such field."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        config = dataclasses.replace(
            config, **{first: changed(getattr(config, first), {rest: value}) if rest else value}
        )
    return config


def pretraining(protocol: Protocol, row: str, seed: int) -> PretrainConfig:
    """Masked image modelling on unlabelled scenes, flips only. All rows of a seed see the same views and tokens."""
    steps = round(protocol.pretrain_steps * ROWS[row].length)
    scenes = scene_folder(protocol, "scenes", UNLABELLED_SEED, protocol.unlabelled_images)
    others = scene_folder(protocol, "scenes", HELD_OUT_SEED, protocol.held_out)
    tokens = (
        None
        if ROWS[row].changes.get("objective.target") == "pixels"
        else str(protocol.output / f"tokens_seed{seed}.cache")
    )
    base = PretrainConfig(
        **common(protocol, f"{row}/pretrain_seed{seed}", 100), seed=seed, steps=steps, batch_size=32,
        batch_per_device=32, eval_every=500, model=ModelConfig(**SHAPE),
        masking=MaskingConfig(num_masked=26, min_num_patches=4),
        data=DataConfig(
            path=str(scenes), normalization="half", scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.0,
            threads=protocol.threads, view_cycle=2, token_cache=tokens
        ),
        tokenizer=TokenizerConfig(name="demo"), evaluation=EvaluationConfig(images=protocol.held_out, path=str(others)),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=steps // 16, betas=(0.9, 0.98))
    )  # fmt: skip
    config: PretrainConfig = changed(base, ROWS[row].changes)
    return config


def labelled(protocol: Protocol, labels: Labels, seed: int, count: int) -> LabelledDataConfig:
    """Labelled scenes of a seed, to be measured on the test set; of `TUNING_SEED`, on the tuning set."""
    training = check_disjoint(protocol, scene_folder(protocol, labels, TRAINING_SEED + seed, count), labels)
    validation = evaluation_folder(protocol, labels)
    if seed == TUNING_SEED:
        tuning = scene_folder(protocol, labels, TUNING_VALIDATION_SEED, protocol.tuning_images)
        validation = check_disjoint(protocol, tuning, labels)
    return LabelledDataConfig(
        path=str(training), validation_path=str(validation), normalization="half", crop_share=1.0,
        threads=protocol.threads
    )  # fmt: skip


def downstream(protocol: Protocol, row: str, seed: int) -> dict[str, Any]:
    """Model, weights and seed of a fine-tuning or a probe. Rates are chosen on the pre-training of seed 0."""
    model = {key.removeprefix("model."): value for key, value in ROWS[row].changes.items() if key.startswith("model.")}
    weights = protocol.output / "runs" / row / f"pretrain_seed{0 if seed == TUNING_SEED else seed}"
    scratch = ROWS[row].length == 0
    return {
        "model": ClassifierModelConfig(**(SHAPE | model)), "scratch": scratch, "seed": seed,
        "weights": None if scratch else str(weights)
    }  # fmt: skip


def finetuning(protocol: Protocol, row: str, labels: Labels, seed: int, rate: float) -> FinetuneConfig:
    """Fine-tuning of all weights, measured six times; from scratch all layers learn alike."""
    steps = round(protocol.finetune_steps * ROWS[row].finetune_length)
    return FinetuneConfig(
        **common(protocol, f"{row}/finetune_{labels}_seed{seed}_lr{rate:g}", 50), **downstream(protocol, row, seed),
        steps=steps, batch_size=32, batch_per_device=32, eval_every=max(steps // 6, 1),
        layer_decay=protocol.layer_decay if ROWS[row].length else 1.0,
        data=labelled(protocol, labels, seed, protocol.labelled_images),
        augment=AugmentConfig(
            scale=(0.7, 1.0), rand_augment=0.0, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0
        ),
        optim=OptimConfig(lr=rate, min_lr=1e-6, warmup_steps=steps // 10, clip_grad=3.0)
    )  # fmt: skip


def probing(protocol: Protocol, row: str, labels: Labels, seed: int, rate: float) -> ProbeConfig:
    """Linear probes of every block on standardised features, without augmentation."""
    return ProbeConfig(
        **common(protocol, f"{row}/probe_{labels}_seed{seed}_lr{rate:g}", 800), **downstream(protocol, row, seed),
        epochs=protocol.probe_epochs, batch_size=min(100, protocol.probe_images), batch_per_device=100, augment=False,
        standardise=True, data=labelled(protocol, labels, seed, protocol.probe_images),
        optim=OptimConfig(lr=rate, min_lr=0.0, warmup_steps=0, weight_decay=1e-4, clip_grad=None)
    )  # fmt: skip
