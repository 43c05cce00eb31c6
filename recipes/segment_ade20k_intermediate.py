"""Segment ADE20K with BEiT-B and UPerNet at 512 pixels, after intermediate fine-tuning (official configuration).

    python recipes/segment_ade20k_intermediate.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/segment_ade20k_intermediate.py \\
        --data.path /data/ADEChallengeData2016 --weights runs/intermediate_imagenet22k_base

Published: nothing at 512 pixels; at 640 pixels mIoU 53.6 (`segment_ade20k_640.py`, table 7). Hardware: 8 GPUs with two
crops each; time not published.
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
    output_dir=Path("runs/segment_ade20k_intermediate"),
    steps=160_000,
    batch_size=16,
    batch_per_device=2,
    layer_decay=0.9,
    data=segment.SegmentationDataConfig(num_classes=150, reduce_zero_label=True),
    model=segment.SegmentationModelConfig(size="base", drop_path_rate=0.1),
    optim=OptimConfig(
        lr=3e-5, min_lr=0.0, warmup_lr=3e-11, warmup_steps=1500, schedule="poly", weight_decay=0.05, clip_grad=None
    ),
    eval_every=16_000,
)

if __name__ == "__main__":
    main(config, segment.Segment, __doc__)
