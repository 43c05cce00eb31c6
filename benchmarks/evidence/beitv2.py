"""Does BEiT v2's chain work, and does it pay here? A tiny teacher, tokenizers it teaches, pre-training with them.

    python -m benchmarks.evidence.beitv2 --output records/beitv2.json       # 35 minutes of one CPU core

The teacher is a tiny BEiT pre-trained on built-in images with the demo tokenizer. Over three seeds: a tokenizer that
reproduces its features, a BEiT pre-trained with that tokenizer's tokens and the extra head (v2), and one with the demo
tokenizer's and without (v1), of as many steps. Models are compared by k-NN and a linear probe of their mean patch
tokens on labelled surfaces (12 classes: 4 textures in 3 sizes, those of benchmarks.evidence.continued). A functional
check: what the teacher cost is not counted against v2.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit_fast.models import Beit
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.knn import KnnEvaluation
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks import pretrain, vqkd
from beit_fast.train.tasks.teacher import TeacherConfig
from benchmarks.evidence.continued import interval, scan
from benchmarks.machine import environment

SIDE = 64
METRICS = ("knn_top1_percent", "probe_top1_percent")
TOKENIZER_METRICS = (
    "held_out_cosine", "constant_cosine", "held_out_used_codes_share", "held_out_perplexity", "used_codes_share"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes; the defaults are those of the record."""

    teacher_steps: int = 500
    tokenizer_steps: int = 120
    steps: int = 80
    """Of each pre-training."""
    batch: int = 32
    seeds: int = 3
    images: int = 1000
    train: int = 960
    test: int = 480


def write_labelled(root: Path, study: Study) -> None:
    """Labelled surfaces of 8 bits in folders of classes; no two sets share one."""
    for name, count, seed in (("train", study.train, 12), ("val", study.test, 13)):
        for index in range(count):
            pixels, label = scan(index, seed)
            folder = root / "labelled" / name / f"{label:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels // 16).astype(np.uint8)).save(folder / f"{index:05d}.png")


def measured(root: Path, config: pretrain.PretrainConfig) -> dict[str, float]:
    """What k-NN and a linear probe make of a pre-trained model."""
    options = config.data.loader_options(torch.device("cpu")) | {"decoder": "auto"}
    knn = KnnEvaluation(str(root / "labelled"), SIDE, 0.01, probe=True, **options)
    try:
        model = Beit.from_pretrained(config.output_dir / "model").eval()
        values = knn.evaluate(model, World(0, 1, torch.device("cpu")), 32)
    finally:
        for views in knn.views:
            views.close()
    return {name: values[name] for name in METRICS}


def common(root: Path, name: str, study: Study, steps: int, seed: int) -> dict[str, Any]:
    """What all runs have."""
    return {
        "output_dir": root / name, "steps": steps, "seed": seed, "batch_size": study.batch,
        "batch_per_device": study.batch, "precision": "fp32", "device": "cpu",
        "checkpoint": CheckpointConfig(every_steps=10_000), "log": LogConfig(every_steps=50, progress="lines"),
    }  # fmt: skip


def pre_training(root: Path, name: str, study: Study, steps: int, seed: int, tokens: str) -> pretrain.PretrainConfig:
    """The model of recipes/pretrain_tiny_builtin.py; as BEiT v2 where the tokens are not the demo tokenizer's."""
    v2 = tokens != "demo"
    return pretrain.PretrainConfig(
        **common(root, name, study, steps, seed),
        data=pretrain.DataConfig(
            builtin_images=study.images, builtin_size=SIDE, normalization="half", scale=(0.6, 1.0), jitter=0.1,
            threads=1, one_view=v2,
        ),
        model=pretrain.ModelConfig(
            size="tiny", width=128, depth=4, num_heads=4, image_size=SIDE, patch_size=8, drop_path_rate=0.0,
            use_abs_pos_emb=True, layer_scale_init=0.0, init_std=0.05,
        ),
        objective=pretrain.ObjectiveConfig(head_layers=1, early_layers=3) if v2 else pretrain.ObjectiveConfig(),
        masking=pretrain.MaskingConfig(num_masked=26, min_num_patches=4),
        tokenizer=pretrain.TokenizerConfig(name=tokens),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=max(1, steps // 10), betas=(0.9, 0.98)),
    )  # fmt: skip


def tokenizer(root: Path, name: str, study: Study, seed: int, teacher: str) -> vqkd.TrainVqkdConfig:
    """The tokenizer of recipes/train_tokenizer_vqkd_tiny_builtin.py."""
    return vqkd.TrainVqkdConfig(
        **common(root, name, study, study.tokenizer_steps, seed),
        teacher=TeacherConfig(name=teacher),
        model=vqkd.VqkdModelConfig(
            width=128, depth=4, decoder_depth=1, image_size=SIDE, patch_size=8, vocab_size=512, code_dim=16
        ),
        data=vqkd.VqkdDataConfig(builtin_images=study.images, builtin_size=SIDE, scale=(0.6, 1.0), threads=1),
        evaluation=vqkd.VqkdEvaluationConfig(knn=str(root / "labelled")),
        optim=OptimConfig(
            lr=1e-3, warmup_steps=max(1, study.tokenizer_steps // 10), weight_decay=1e-4, betas=(0.9, 0.99),
            clip_grad=None,
        ),
    )  # fmt: skip


def trained(root: Path, config: Any) -> dict[str, float]:
    """Train, unless that is done, and measure: a tokenizer as its run does at its end, a model here."""
    began = time.perf_counter()
    if isinstance(config, pretrain.PretrainConfig):
        engine.run(pretrain.MaskedImageModeling(config))
        values = measured(root, config)
    else:
        engine.run(vqkd.TrainVqkd(config))
        lines = read_metrics(config.output_dir / "metrics.jsonl")
        names = (*TOKENIZER_METRICS, *METRICS)
        values = {name: next(line[name] for line in reversed(lines) if name in line) for name in names}
    return values | {"seconds": time.perf_counter() - began}


def summary(runs: dict[str, dict[str, float]], seeds: int) -> dict[str, tuple[float, float, float]]:
    """Means over the seeds that are done, with Student's 95 % interval; of models the difference paired by seed."""
    found: dict[str, tuple[float, float, float]] = {}
    tokens = [runs[name] for s in range(seeds) if (name := f"tokenizer_{s}") in runs]
    if len(tokens) > 1:
        found["cosine above the best constant"] = interval(
            [t["held_out_cosine"] - t["constant_cosine"] for t in tokens]
        )
        for name in ("used_codes_share", "held_out_used_codes_share"):
            found[name] = interval([t[name] for t in tokens])
    done = [s for s in range(seeds) if f"v1_{s}" in runs and f"v2_{s}" in runs]
    for metric in METRICS if len(done) > 1 else ():
        found[f"{metric}: v2 minus v1"] = interval([runs[f"v2_{s}"][metric] - runs[f"v1_{s}"][metric] for s in done])
    return found


def main() -> None:
    """Run what is not in the record yet, and write it after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/beitv2"))
    options = parser.parse_args()
    study, root = Study(), options.work
    record = json.loads(options.output.read_text()) if options.output.exists() else {
        "study": dataclasses.asdict(study), "environment": environment(torch.device("cpu")), "runs": {},
    }  # fmt: skip
    if not (root / "labelled/val").is_dir():
        write_labelled(root, study)
    teacher = pre_training(root, "teacher", study, study.teacher_steps, 100, "demo")
    if not (teacher.output_dir / "complete.json").is_file():
        engine.run(pretrain.MaskedImageModeling(teacher))
    record["runs"]["teacher"] = measured(root, teacher)
    print("teacher", record["runs"]["teacher"], flush=True)
    plan: dict[str, Any] = {}
    for seed in range(study.seeds):
        name = f"tokenizer_{seed}"
        plan[name] = tokenizer(root, name, study, seed, str(root / "teacher"))
    for seed in range(study.seeds):
        tokens = str(root / f"tokenizer_{seed}" / "tokenizer.safetensors")
        plan[f"v2_{seed}"] = pre_training(root, f"v2_{seed}", study, study.steps, seed, tokens)
        plan[f"v1_{seed}"] = pre_training(root, f"v1_{seed}", study, study.steps, seed, "demo")
    for name, config in plan.items():
        if name in record["runs"]:
            continue
        record["runs"][name] = trained(root, config)
        record["summary"] = summary(record["runs"], study.seeds)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        print(name, record["runs"][name], flush=True)
    print(json.dumps(record.get("summary"), indent=1))


if __name__ == "__main__":
    main()
