"""Fine-tune BEiT-B on ImageNet-1k at 224 pixels (paper, table 13).

    python recipes/finetune_imagenet_base.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/finetune_imagenet_base.py \\
        --data.path /data/imagenet --weights runs/pretrain_beit_base

Published: 83.2 top-1 after 800 epochs of pre-training on ImageNet-1k (table 1, preset `plain`); after 300 epochs 82.86
`plain`, 83.22 `plus` (table 5).
The learning rate is the best of 2, 3, 4 and 5e-3 in the paper; 4e-3 is that of the official command line. The paper
repeats each image three times per batch, the official script does not: `--augment.repeats 1`. Hardware: 8 GPUs in the
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
    output_dir=Path("runs/finetune_imagenet_base"),
    epochs=100,
    batch_size=1024,
    batch_per_device=128,
    layer_decay=0.65,
    data=finetune.LabelledDataConfig(num_classes=1000),
    model=finetune.ClassifierModelConfig(size="base", drop_path_rate=0.1),
    augment=finetune.AugmentConfig(repeats=3),
    optim=OptimConfig(lr=4e-3, min_lr=1e-6, warmup_epochs=20, weight_decay=0.05, clip_grad=None),
)

if __name__ == "__main__":
    main(config, finetune.Finetune, __doc__)
