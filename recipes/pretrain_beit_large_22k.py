"""BEiT-L/16 pre-trained on ImageNet-22k, 150 epochs: paper (arXiv 2106.08254), appendices A and B.

    python recipes/pretrain_beit_large_22k.py                       # built-in demo: the real BEiT-L, a few steps
    python recipes/pretrain_beit_large_22k.py --data.path /imagenet22k --dry-run
    torchrun --nproc-per-node 8 recipes/pretrain_beit_large_22k.py --data.path /imagenet22k --batch-per-device 128

Result: after intermediate fine-tuning on the labels of ImageNet-22k, 87.4 % ImageNet-1k top-1 at 224 px, 88.4 % at
384 px, 88.6 % at 512 px (table 6); without it 86.0 % at 224 px (official README). The README pre-trains the
base model only: batch, rates and epochs here are those, LayerScale is its value for large models, clip table 12's.
Model: `plus`, as released. Images are normalised by 0.5, which fine-tuning has to repeat. The usual 14.2 million images
make 6,932 steps per epoch, about a million in all; hardware and time are not published.
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
    output_dir=Path("runs/pretrain_beit_large_22k"),
    epochs=150,
    batch_size=2048,
    batch_per_device=64,
    model=pretrain.ModelConfig(size="large", preset="plus", drop_path_rate=0.1),
    optim=OptimConfig(
        lr=1.5e-3, min_lr=1e-5, warmup_steps=10_000, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=1.0
    ),
    data=pretrain.DataConfig(normalization="half"),
    tokenizer=pretrain.TokenizerConfig(name="dalle"),
)

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__)
