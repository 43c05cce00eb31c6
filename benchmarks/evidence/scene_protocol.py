"""Training on drawn scenes: the settings that the evidence programs share, so that their numbers compare.

Scenes of 64 x 64 pixels, 24 classes = 6 shapes x 4 textures, and a BEiT of width 128 and depth 4: a functional check of
the method, not ImageNet. Pre-training sees unlabelled scenes of its own; the labelled training scenes differ from seed
to seed, the validation scenes are always the same and are never trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beit_fast.data.builtin import builtin_source
from beit_fast.data.labelled import BuiltinSet
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

SHAPE: dict[str, Any] = {
    "size": "tiny", "width": 128, "depth": 4, "num_heads": 4, "image_size": 64, "patch_size": 8, "drop_path_rate": 0.0,
    "init_std": 0.05,
}  # fmt: skip
"""Fields of the model; an initial standard deviation of 0.05 is for width 128 what 0.02 is for 768."""


def common(output_dir: Path, device: str, every: int) -> dict[str, Any]:
    """What all runs share; a line of metrics `every` so many steps."""
    return {
        "output_dir": output_dir, "device": device, "precision": "fp32",
        "log": LogConfig(every_steps=every, progress="lines"), "checkpoint": CheckpointConfig(every_steps=500),
    }  # fmt: skip


def pretraining(
    shared: dict[str, Any], model: ModelConfig, *, steps: int, images: int, held_out: int, cache_dir: str | None,
    threads: int,
) -> PretrainConfig:  # fmt: skip
    """Masked image modelling on `images` unlabelled scenes, seed 7; held out are those of seed 8. Flips only."""
    scenes, others = (
        builtin_source(cache_dir, count, seed, 64, labelled=True).root for count, seed in ((images, 7), (held_out, 8))
    )
    return PretrainConfig(
        **shared, steps=steps, batch_size=32, batch_per_device=32, eval_every=500, model=model,
        masking=MaskingConfig(num_masked=26, min_num_patches=4),
        data=DataConfig(
            path=str(scenes), normalization="half", scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.0, threads=threads
        ),
        tokenizer=TokenizerConfig(name="demo"), evaluation=EvaluationConfig(images=held_out, path=str(others)),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=steps // 16, betas=(0.9, 0.98)),
    )  # fmt: skip


def labelled(
    seed: int, *, images: int, validation_images: int, cache_dir: str | None, threads: int,
    builtin: BuiltinSet = "scenes",
) -> LabelledDataConfig:  # fmt: skip
    """Training scenes of a seed and the validation scenes."""
    return LabelledDataConfig(
        builtin=builtin, builtin_images=images, builtin_validation_images=validation_images, builtin_size=64,
        builtin_seed=1000 + seed, cache_dir=cache_dir, normalization="half", crop_share=1.0, threads=threads,
    )  # fmt: skip


def probing(
    shared: dict[str, Any], model: ClassifierModelConfig, data: LabelledDataConfig, *, weights: str | None, epochs: int,
    seed: int,
) -> ProbeConfig:  # fmt: skip
    """Probes of every block on standardised features, without augmentation; of random weights without `weights`."""
    return ProbeConfig(
        **shared, weights=weights, scratch=weights is None, seed=seed, epochs=epochs,
        batch_size=min(100, data.builtin_images), batch_per_device=100, augment=False, standardise=True, data=data,
        model=model,
        optim=OptimConfig(lr=4e-3, min_lr=0.0, warmup_steps=0, weight_decay=1e-4, clip_grad=None),
    )  # fmt: skip


def classifying(
    shared: dict[str, Any], model: ClassifierModelConfig, data: LabelledDataConfig, *, weights: str | None, steps: int,
    rate: float, layer_decay: float, seed: int, evaluations: int, scale: tuple[float, float] = (0.7, 1.0),
) -> FinetuneConfig:  # fmt: skip
    """Fine-tuning from `weights`, or training from scratch, where all layers learn alike; crops of `scale`, flips."""
    scratch = weights is None
    return FinetuneConfig(
        **shared, weights=weights, scratch=scratch, seed=seed, steps=steps, batch_size=32, batch_per_device=32,
        eval_every=max(steps // evaluations, 1), layer_decay=1.0 if scratch else layer_decay, data=data,
        model=model,
        augment=AugmentConfig(
            scale=scale, rand_augment=0.0, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0
        ),
        optim=OptimConfig(lr=rate, min_lr=1e-6, warmup_steps=steps // 10, clip_grad=3.0),
    )  # fmt: skip
