"""BEiT-L/16 pre-trained on ImageNet-1k, 800 epochs: paper (arXiv 2106.08254), section 3 and table 12.

    python recipes/pretrain_beit_large.py                       # built-in demo: the real BEiT-L, a few steps
    python recipes/pretrain_beit_large.py --data.path /imagenet/train --dry-run
    torchrun --nproc-per-node 8 recipes/pretrain_beit_large.py --data.path /imagenet/train --batch-per-device 128

Model: `plus` (LayerScale, relative position bias: appendix A, the released weights); `--model.preset plain` gives the
paper's own tables, 85.2 % ImageNet-1k top-1 after fine-tuning at 224 px, 86.3 % at 384 px (table 1). No result of a
`plus` model of this size pre-trained on ImageNet-1k only is published.
Hardware: for the large model neither hardware nor time is published; the base model took 16 V100 about five days.
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
    output_dir=Path("runs/pretrain_beit_large"),
    epochs=800,
    batch_size=2048,
    batch_per_device=64,
    model=pretrain.ModelConfig(size="large", preset="plus", drop_path_rate=0.1),
    optim=OptimConfig(lr=1.5e-3, min_lr=1e-5, warmup_epochs=10, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=1.0),
    tokenizer=pretrain.TokenizerConfig(name="dalle"),
)

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__)
