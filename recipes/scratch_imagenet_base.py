"""Train BEiT-B's architecture on ImageNet-1k from random weights: what pre-training has to beat (paper, table 1).

    python recipes/scratch_imagenet_base.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/scratch_imagenet_base.py --data.path /data/imagenet

Published: 77.9 top-1 for ViT-B at 384 pixels, 81.8 for DeiT-B at 224; the paper quotes both and trains neither.
The settings are DeiT-B's with the augmentation of this library's fine-tuning. Hardware: 8 GPUs; not run by us.
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
    output_dir=Path("runs/scratch_imagenet_base"),
    scratch=True,
    epochs=300,
    batch_size=1024,
    batch_per_device=128,
    layer_decay=1.0,
    data=finetune.LabelledDataConfig(num_classes=1000),
    model=finetune.ClassifierModelConfig(size="base", drop_path_rate=0.1),
    augment=finetune.AugmentConfig(repeats=3),
    optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5, weight_decay=0.05, clip_grad=None),
)

if __name__ == "__main__":
    main(config, finetune.Finetune, __doc__)
