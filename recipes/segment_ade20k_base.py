"""Segment ADE20K with BEiT-B and UPerNet at 512 pixels, from pre-trained weights (official configuration).

    python recipes/segment_ade20k_base.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/segment_ade20k_base.py \\
        --data.path /data/ADEChallengeData2016 --weights runs/pretrain_beit_base

Published: mIoU 45.70 after 300 epochs of pre-training on ImageNet-1k, preset `plus` (table 5; the resolution is not
stated). The official file is that for weights pre-trained without labels, of ImageNet-22k too. Multi-scale scores:
`--evaluation.ratios 0.5 0.75 1 1.25 1.5 1.75 --evaluation.flip`. Hardware: 8 GPUs with two crops each; time not
published.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import OptimConfig
from beit_fast.train.tasks import segment

config = segment.SegmentConfig(
    output_dir=Path("runs/segment_ade20k_base"),
    steps=160_000,
    batch_size=16,
    batch_per_device=2,
    layer_decay=0.65,
    data=segment.SegmentationDataConfig(num_classes=150, reduce_zero_label=True),
    model=segment.SegmentationModelConfig(size="base", drop_path_rate=0.1),
    optim=OptimConfig(
        lr=7e-4, min_lr=0.0, warmup_lr=7e-10, warmup_steps=1500, schedule="poly", weight_decay=0.05, clip_grad=None
    ),
    eval_every=16_000,
)

if __name__ == "__main__":
    main(config, segment.Segment, __doc__)
