"""Fine-tune BEiT-B on CIFAR-100 at 224 pixels (paper, tables 11 and 13).

    python recipes/finetune_cifar100.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/finetune_cifar100.py \\
        --data.path /data/cifar-100-binary --weights runs/pretrain_beit_base
    ... --weights runs/finetune_imagenet_base        # after intermediate fine-tuning on ImageNet-1k

Published: 90.1 top-1 from pre-training on ImageNet-1k alone, 91.8 after intermediate fine-tuning; 48.5 from scratch.
Takes the binary version of CIFAR-100 or the python one, extracted. The learning rate is the best of 2, 3, 4 and 5e-3
in the paper. Hardware and time not published.
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
    output_dir=Path("runs/finetune_cifar100"),
    epochs=150,
    batch_size=512,
    batch_per_device=64,
    layer_decay=0.65,
    data=finetune.LabelledDataConfig(num_classes=100),
    model=finetune.ClassifierModelConfig(size="base", drop_path_rate=0.1),
    augment=finetune.AugmentConfig(erasing=0.0, repeats=3),
    optim=OptimConfig(lr=4e-3, min_lr=1e-6, warmup_epochs=20, weight_decay=0.3, clip_grad=None),
)

if __name__ == "__main__":
    main(config, finetune.Finetune, __doc__)
