"""BEiT v2 Large pre-trained on ImageNet-1k, 1,600 epochs: arXiv 2208.06366, section 3.

    python recipes/pretrain_beitv2_large.py                    # built-in demo: the real model, a few steps
    python recipes/pretrain_beitv2_large.py --data.path /imagenet/train --dry-run
    torchrun --nproc-per-node 8 recipes/pretrain_beitv2_large.py --data.path /imagenet/train --batch-per-device 64

As recipes/pretrain_beitv2_base.py, with LayerScale from 1e-5 and the early patch tokens of block 21 of 24.
300 epochs: `--epochs 300 --optim.betas 0.9 0.98`, 86.6 % ImageNet-1k top-1 after fine-tuning; 1,600: 87.3 % (published;
not run here).
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
    output_dir=Path("runs/pretrain_beitv2_large"),
    epochs=1600,
    batch_size=2048,
    batch_per_device=32,
    data=pretrain.DataConfig(scale=(0.2, 1.0), one_view=True),
    model=pretrain.ModelConfig(size="large", preset="plus", drop_path_rate=0.1),
    objective=pretrain.ObjectiveConfig(head_layers=2, early_layers=21),
    optim=OptimConfig(lr=1.5e-3, min_lr=1e-5, warmup_epochs=10, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=3.0),
    tokenizer=pretrain.TokenizerConfig(name="vqkd"),
)

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__)
