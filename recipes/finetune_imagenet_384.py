"""Ten more epochs at 384 pixels on ImageNet-1k, from a BEiT fine-tuned at 224 (paper, section 3.1 and table 1).

    python recipes/finetune_imagenet_384.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/finetune_imagenet_384.py \\
        --data.path /data/imagenet --weights runs/finetune_imagenet_base
    ... --model.size large --layer-decay 0.9 --model.drop-path-rate 0.4 --weights runs/finetune_imagenet_large

Published: 84.6 top-1 for BEiT-B, 86.3 for BEiT-L. Relative position tables are resized by the official spline.
The paper gives the number of epochs only ("following DeiT"); rate, decay and augmentation here are those of the
official command lines for 384 pixels after intermediate fine-tuning. Hardware: 8 GPUs there; time not published.
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
    output_dir=Path("runs/finetune_imagenet_384"),
    epochs=10,
    batch_size=512,
    batch_per_device=32,
    layer_decay=0.85,
    data=finetune.LabelledDataConfig(num_classes=1000),
    model=finetune.ClassifierModelConfig(size="base", image_size=384, drop_path_rate=0.1),
    augment=finetune.AugmentConfig(mixup=0.0, cutmix=0.0),
    optim=OptimConfig(lr=2e-5, min_lr=1e-6, warmup_epochs=1, weight_decay=1e-8, clip_grad=None),
)

if __name__ == "__main__":
    main(config, finetune.Finetune, __doc__)
