"""Intermediate fine-tuning of BEiT-L on ImageNet-22k with its labels (paper, appendix B).

    python recipes/intermediate_imagenet22k_large.py        # built-in demo: the real model, a few steps
    torchrun --nnodes 2 --nproc-per-node 8 recipes/intermediate_imagenet22k_large.py \\
        --data.path /data/imagenet22k --data.no-validate --weights beit_large_patch16_224_pt22k.pth

Published: 87.4 top-1 on ImageNet-1k after it for BEiT-L at 224 pixels (table 6).
Settings are those of the official command line, without its gradient clipping, which DeepSpeed ignored there.
ImageNet-22k has no validation split; without `--data.no-validate` a folder `val` is expected. Hardware: 16 GPUs in the
official command line; time not published.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import OptimConfig
from beit_fast.train.tasks import finetune

config = finetune.FinetuneConfig(
    output_dir=Path("runs/intermediate_imagenet22k_large"),
    epochs=90,
    batch_size=2048,
    batch_per_device=64,
    layer_decay=0.75,
    data=finetune.LabelledDataConfig(num_classes=21841, normalization="half"),
    model=finetune.ClassifierModelConfig(size="large", drop_path_rate=0.2),
    augment=finetune.AugmentConfig(mixup=0.0, cutmix=0.0),
    optim=OptimConfig(lr=2e-3, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05, clip_grad=None),
)

if __name__ == "__main__":
    main(config, finetune.Finetune, __doc__)
