"""Segment ADE20K with BEiT-B and UPerNet at 640 pixels, after intermediate fine-tuning (paper, table 7).

    python recipes/segment_ade20k_640.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/segment_ade20k_640.py \\
        --data.path /data/ADEChallengeData2016 --weights runs/intermediate_imagenet22k_base
    ... --model.size large --layer-decay 0.95 --model.drop-path-rate 0.2 --optim.lr 2e-5 --optim.warmup-lr 2e-11 \\
        --batch-per-device 1 --weights runs/intermediate_imagenet22k_large

Published: mIoU 53.6, multi-scale 54.2, for BEiT-B (53.61 and 54.26 in the official README); 56.7 and 57.0 for BEiT-L.
Re-trained by others: 53.0 to 53.3 (B), 55.9 (L). The official BEiT-L run has one crop on each of 8 GPUs and sums two
steps, as `--batch-per-device 1` does on 8 GPUs. Hardware: 8 GPUs; time not published.
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
    output_dir=Path("runs/segment_ade20k_640"),
    steps=160_000,
    batch_size=16,
    batch_per_device=2,
    layer_decay=0.9,
    data=segment.SegmentationDataConfig(num_classes=150, reduce_zero_label=True),
    model=segment.SegmentationModelConfig(size="base", image_size=640, drop_path_rate=0.1),
    crops=segment.CropConfig(base=(2560, 640)),
    optim=OptimConfig(
        lr=3e-5, min_lr=0.0, warmup_lr=3e-11, warmup_steps=1500, schedule="poly", weight_decay=0.05, clip_grad=None
    ),
    eval_every=16_000,
)

if __name__ == "__main__":
    main(config, segment.Segment, __doc__)
