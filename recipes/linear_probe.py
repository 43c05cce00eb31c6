"""Linear probes of all blocks of a frozen BEiT on ImageNet-1k, in one pass (paper, table 9).

    python recipes/linear_probe.py        # built-in demo: the real model, a few steps
    torchrun --nproc-per-node 8 recipes/linear_probe.py \\
        --data.path /data/imagenet --weights runs/pretrain_beit_base
    ... --model.size large --weights runs/pretrain_beit_large

Published: 56.7 top-1 for BEiT-B (best layer: 9 of 12), 73.5 for BEiT-L (14 of 24). Deeper layers serve the pre-training
task and are worse. `--features mean` reads what the paper describes, the default what the official code does.
Hardware: 8 GPUs in the official command line; time not published.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import OptimConfig
from beit_fast.train.tasks import finetune, probe

config = probe.ProbeConfig(
    output_dir=Path("runs/linear_probe"),
    epochs=50,
    batch_size=1024,
    batch_per_device=128,
    data=finetune.LabelledDataConfig(num_classes=1000),
    model=finetune.ClassifierModelConfig(size="base", drop_path_rate=0.0),
    optim=OptimConfig(lr=4e-3, min_lr=0.0, warmup_epochs=0, weight_decay=1e-4, clip_grad=None),
)

if __name__ == "__main__":
    main(config, probe.LinearProbe, __doc__)
