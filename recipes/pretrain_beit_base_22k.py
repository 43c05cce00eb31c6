"""BEiT-B/16 pre-trained on ImageNet-22k, 150 epochs: paper (arXiv 2106.08254), appendices A and B.

    python recipes/pretrain_beit_base_22k.py                       # built-in demo: the real BEiT-B, a few steps
    python recipes/pretrain_beit_base_22k.py --data.path /imagenet22k --dry-run
    torchrun --nproc-per-node 8 recipes/pretrain_beit_base_22k.py --data.path /imagenet22k --batch-per-device 128

Result: after intermediate fine-tuning on the labels of ImageNet-22k, 85.2 % ImageNet-1k top-1 at 224 px and 86.8 % at
384 px (table 6 and the official README, whose command line this is); without it 83.7 % at 224 px (README).
Model: `plus`, as released. Images are normalised by 0.5, which fine-tuning has to repeat. The usual 14.2 million images
make 6,932 steps per epoch, about a million in all. Hardware: 16 V100 of 32 GB (README); the time is not published.
V100 today: see recipes/pretrain_beit_base.py.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import OptimConfig
from beit_fast.train.tasks import pretrain

config = pretrain.PretrainConfig(
    output_dir=Path("runs/pretrain_beit_base_22k"),
    epochs=150,
    batch_size=2048,
    batch_per_device=64,
    model=pretrain.ModelConfig(size="base", preset="plus", drop_path_rate=0.1),
    optim=OptimConfig(
        lr=1.5e-3, min_lr=1e-5, warmup_steps=10_000, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=3.0
    ),
    data=pretrain.DataConfig(normalization="half"),
    tokenizer=pretrain.TokenizerConfig(name="dalle"),
)

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__)
