"""Writes `recipes/README.md`: one row per recipe, its settings read from the recipe itself.

python -m benchmarks.recipe_table
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"

PUBLISHED = {
    "pretrain_beit_base": "after fine-tuning 83.2 at 224 px, 84.6 at 384 px (`plain`)",
    "pretrain_beit_large": "after fine-tuning 85.2 at 224 px, 86.3 at 384 px (`plain`)",
    "pretrain_beit_base_22k": "after fine-tuning 83.7; with labels of ImageNet-22k in between 85.2, 86.8 at 384 px",
    "pretrain_beit_large_22k": "after fine-tuning 86.0; with labels of ImageNet-22k in between 87.4, 88.6 at 512 px",
    "pretrain_beitv2_base": "after fine-tuning 85.5; 85.0 after 300 epochs (BEiT v2's paper)",
    "pretrain_beitv2_large": "after fine-tuning 87.3; 86.6 after 300 epochs (BEiT v2's paper)",
    "finetune_imagenet_base": "83.2 (`plain`, 800 epochs); 82.86 `plain`, 83.22 `plus` (300 epochs)",
    "finetune_imagenet_large": "85.2 (`plain`, 800 epochs)",
    "finetune_imagenet_384": "BEiT-B 84.6, BEiT-L 86.3",
    "finetune_imagenet_after_22k": "BEiT-B 85.2, 86.8 at 384 px; BEiT-L 87.4, 88.4 at 384 px, 88.6 at 512 px",
    "finetune_cifar100": "90.1; after ImageNet-1k 91.8; from scratch 48.5",
    "scratch_imagenet_base": "ViT-B 77.9 at 384 px, DeiT-B 81.8 at 224 px",
    "linear_probe": "BEiT-B 56.7 (layer 9), BEiT-L 73.5 (layer 14)",
    "segment_ade20k_base": "mIoU 45.7 (300 epochs, `plus`)",
    "segment_ade20k_640": "mIoU 53.6, multi-scale 54.2; BEiT-L 56.7, multi-scale 57.0",
    "segment_ade20k_setr": "mIoU 45.6 (800 epochs, `plain`); after ImageNet-1k labels 47.7 (its head was not released)",
}
"""Top-1 in percent, on ImageNet-1k unless the recipe is for other data (paper, and the official README for 22k)."""

EVIDENCE = {
    "pretrain_tiny_builtin": "[held-out loss against the tokens' entropy](../benchmarks/records/"
    "2026-11-21_xeon-2.5ghz-2cpu_pretrain_tiny_builtin.jsonl)",
    "train_tokenizer": "[the demo tokenizer](../benchmarks/records/2026-11-21_xeon-2.5ghz-2cpu_demo_tokenizer.jsonl)",
}
"""What this project has run so far; nothing here has been trained on ImageNet."""

HEAD = """# Recipes

One experiment per file, values only. Every field can be overridden on the command line (`--help`), `--dry-run` says
what a run takes. Without `--data.path` most run a short demo of the real model on built-in images.
This page is written by `python -m benchmarks.recipe_table`.

| recipe | experiment | settings | published, % | our evidence so far |
|---|---|---|---|---|
"""


def load(path: Path) -> Any:
    """A recipe as a module, without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(config: Any) -> str:
    """Length, batch, learning rate and what else sets the recipe apart."""
    if hasattr(config, "describe"):
        return str(config.describe())
    model, augment = getattr(config, "model", None), getattr(config, "augment", None)
    length = f"{config.steps:,} steps" if config.steps is not None else f"{config.epochs:g} epochs"
    parts = [length, f"batch {config.batch_size}", f"lr {config.optim.lr:g}"]
    if model is not None:
        shape = f"{model.size}, {model.preset}" if model.width is None else f"width {model.width}, depth {model.depth}"
        parts = [f"{shape}, {model.image_size} px", *parts]
        if head := getattr(model, "head", None):
            parts.insert(1, {"upernet": "UPerNet", "setr_pup": "SETR-PUP"}[head])
        if getattr(model, "drop_path_rate", None):
            parts.append(f"drop path {model.drop_path_rate:g}")
    if getattr(config, "layer_decay", None) not in (None, 1.0):
        parts.append(f"layer decay {config.layer_decay:g}")
    parts.append(f"weight decay {config.optim.weight_decay:g}")
    if config.optim.clip_grad is not None:
        parts.append(f"clip {config.optim.clip_grad:g}")
    if augment is not None and not isinstance(augment, bool):
        mixed = f"mixup {augment.mixup:g}, CutMix {augment.cutmix:g}" if augment.mixup or augment.cutmix else "no mixup"
        parts.append(mixed)
        parts += [f"{augment.repeats} views per image"] if augment.repeats > 1 else []
        parts += ["no erasing"] if not augment.erasing else []
    return ", ".join(parts)


def table() -> str:
    """The whole page."""
    rows = []
    for path in sorted(RECIPES.glob("*.py")):
        module, name = load(path), path.stem
        experiment = (module.__doc__ or "").split("\n", 1)[0].rstrip(".").split(": paper", 1)[0].split(" (paper", 1)[0]
        cells = (f"[`{name}.py`]({name}.py)", experiment, settings(module.config), PUBLISHED.get(name, "not published"),
                 EVIDENCE.get(name, "none yet"))  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (RECIPES / "README.md").write_text(table())
    print(f"wrote {RECIPES / 'README.md'}")
