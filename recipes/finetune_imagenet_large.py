"""Fine-tune BEiT-L on ImageNet-1k at 224 pixels (paper, table 13).

    python recipes/finetune_imagenet_large.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/finetune_imagenet_large.py \\
        --data.path /data/imagenet --weights runs/pretrain_beit_large

Published: 85.2 top-1 after 800 epochs of pre-training on ImageNet-1k (table 1).
The learning rate is the best of 2, 3, 4 and 5e-3 in the paper. From weights pre-trained on ImageNet-22k without labels
(86.0 top-1): `--optim.lr 1e-3 --model.drop-path-rate 0.2 --data.normalization half`. Hardware: 8 GPUs in the official
command line; time not published.
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
    output_dir=Path("runs/finetune_imagenet_large"),
    epochs=50,
    batch_size=1024,
    batch_per_device=64,
    layer_decay=0.75,
    data=finetune.LabelledDataConfig(num_classes=1000),
    model=finetune.ClassifierModelConfig(size="large", drop_path_rate=0.1),
    optim=OptimConfig(lr=2e-3, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05, clip_grad=None),
)

if __name__ == "__main__":
    main(config, finetune.Finetune, __doc__)
