"""BEiT-B/16 pre-trained on ImageNet-1k, 800 epochs: paper (arXiv 2106.08254), section 3 and table 12.

    python recipes/pretrain_beit_base.py                       # built-in demo: the real BEiT-B, a few steps
    python recipes/pretrain_beit_base.py --data.path /imagenet/train --dry-run
    torchrun --nproc-per-node 8 recipes/pretrain_beit_base.py --data.path /imagenet/train --batch-per-device 128

Model: `plus` (LayerScale, relative position bias: appendix A, the released weights); `--model.preset plain` gives the
paper's own tables, 83.2 % ImageNet-1k top-1 after fine-tuning at 224 px, 84.6 % at 384 px (table 1). After 300 epochs,
`--epochs 300`: plain 82.86 %, plus 83.22 % (table 5).
Hardware: 16 V100 of 32 GB, about five days for 500,000 steps (paper, section 3).
V100 today (looked up in November 2026, not run): torch wheels for CUDA 12.6, which torch's release notes list with
sm_70 for 2.11 and plan to drop with 2.15 (those for CUDA 12.8 and 13 have none), and `nvidia-dali-cuda120`, whose
support table goes down to SM 5.0 (CUDA 13 has no Volta). Add `--precision fp16`, the paper's own; Triton needs
compute capability 8.0, so attention is torch's SDPA there.
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
    output_dir=Path("runs/pretrain_beit_base"),
    epochs=800,
    batch_size=2048,
    batch_per_device=64,
    model=pretrain.ModelConfig(size="base", preset="plus", drop_path_rate=0.1),
    optim=OptimConfig(lr=1.5e-3, min_lr=1e-5, warmup_epochs=10, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=3.0),
    tokenizer=pretrain.TokenizerConfig(name="dalle"),
)

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__)
