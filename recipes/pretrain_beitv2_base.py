"""BEiT v2 Base pre-trained on ImageNet-1k, 1,600 epochs: arXiv 2208.06366, section 3.

    python recipes/pretrain_beitv2_base.py                     # built-in demo: the real model, a few steps
    python recipes/pretrain_beitv2_base.py --data.path /imagenet/train --dry-run
    torchrun --nproc-per-node 8 recipes/pretrain_beitv2_base.py --data.path /imagenet/train --batch-per-device 128

As BEiT, with the tokens of a tokenizer that a teacher taught (`vqkd`: the released one, fetched at first use;
recipes/train_tokenizer_vqkd.py trains one), one view for both, and an extra head that makes CLS a summary.
300 epochs: `--epochs 300 --optim.betas 0.9 0.98 --model.drop-path-rate 0`, 85.0 % ImageNet-1k top-1 after fine-tuning;
1,600: 85.5 % (published; not run here). Fine-tune with recipes/finetune_imagenet_base.py --weights RUN.
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
    output_dir=Path("runs/pretrain_beitv2_base"),
    epochs=1600,
    batch_size=2048,
    batch_per_device=64,
    data=pretrain.DataConfig(scale=(0.2, 1.0), one_view=True),
    model=pretrain.ModelConfig(size="base", preset="plus", drop_path_rate=0.1),
    objective=pretrain.ObjectiveConfig(head_layers=2, early_layers=9),
    optim=OptimConfig(lr=1.5e-3, min_lr=1e-5, warmup_epochs=10, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=3.0),
    tokenizer=pretrain.TokenizerConfig(name="vqkd"),
)

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__)
