"""Fine-tune on ImageNet-1k after intermediate fine-tuning on ImageNet-22k, at 224, 384 or 512 pixels (paper, table 6).

    python recipes/finetune_imagenet_after_22k.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/finetune_imagenet_after_22k.py \\
        --data.path /data/imagenet --weights beit_base_patch16_224_pt22k_ft22k.pth
    ... --model.size large --layer-decay 0.9 --model.drop-path-rate 0.4 --weights beit_large_patch16_224_pt22k_ft22k.pth
    ... --model.image-size 384 (or 512) --batch-per-device 16

Published: BEiT-B 85.2 at 224 and 86.8 at 384; BEiT-L 87.4 at 224, 88.4 at 384 and 88.6 at 512 (top-1).
Settings are those of the official command lines. Hardware: 8 GPUs there; time not published.
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
    output_dir=Path("runs/finetune_imagenet_after_22k"),
    epochs=30,
    batch_size=512,
    batch_per_device=64,
    layer_decay=0.85,
    data=finetune.LabelledDataConfig(num_classes=1000, normalization="half"),
    model=finetune.ClassifierModelConfig(size="base", drop_path_rate=0.1),
    augment=finetune.AugmentConfig(mixup=0.0, cutmix=0.0),
    optim=OptimConfig(lr=2e-5, min_lr=1e-6, warmup_epochs=5, weight_decay=1e-8, clip_grad=None),
)

if __name__ == "__main__":
    main(config, finetune.Finetune, __doc__)
