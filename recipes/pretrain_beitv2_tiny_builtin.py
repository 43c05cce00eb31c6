"""Pre-train a tiny BEiT v2 on built-in images in minutes: tokens taught by a teacher, two heads, without a download.

    python recipes/pretrain_beitv2_tiny_builtin.py             # after recipes/train_tokenizer_vqkd_tiny_builtin.py
    python recipes/pretrain_beitv2_tiny_builtin.py --tokenizer.name demo    # v1's tokens with v2's extra head

A functional check, the values of recipes/pretrain_tiny_builtin.py but for what makes it v2: the tokenizer, one view,
the extra head. Hardware: some 20 minutes of one CPU core. Result: docs/beitv2.md.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import CheckpointConfig, OptimConfig
from beit_fast.train.tasks import pretrain

config = pretrain.PretrainConfig(
    output_dir=Path("runs/pretrain_beitv2_tiny_builtin"),
    steps=2000,
    batch_size=32,
    batch_per_device=32,
    precision="fp32",
    eval_every=250,
    data=pretrain.DataConfig(
        builtin_images=10_000, builtin_size=64, normalization="half", scale=(0.6, 1.0), jitter=0.1, threads=1,
        one_view=True,
    ),
    model=pretrain.ModelConfig(
        size="tiny", width=128, depth=4, num_heads=4, image_size=64, patch_size=8, drop_path_rate=0.0,
        use_abs_pos_emb=True, layer_scale_init=0.0, init_std=0.05,
    ),
    objective=pretrain.ObjectiveConfig(head_layers=1, early_layers=3),
    masking=pretrain.MaskingConfig(num_masked=26, min_num_patches=4),
    tokenizer=pretrain.TokenizerConfig(name="runs/train_tokenizer_vqkd_tiny_builtin/tokenizer.safetensors"),
    evaluation=pretrain.EvaluationConfig(images=1000),
    optim=OptimConfig(lr=1.5e-3, warmup_steps=120, betas=(0.9, 0.98)),
    checkpoint=CheckpointConfig(every_steps=250),
)  # fmt: skip

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__, demo=False)
