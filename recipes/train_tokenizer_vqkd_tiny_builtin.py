"""Train a tiny BEiT v2 tokenizer on built-in images: 512 codes that reproduce the features of a tiny BEiT.

    python recipes/pretrain_tiny_builtin.py                    # the teacher: 17 minutes of one CPU core
    python recipes/train_tokenizer_vqkd_tiny_builtin.py        # this
    python recipes/pretrain_beitv2_tiny_builtin.py             # predicts its tokens

A functional check of the whole chain of BEiT v2 without a download: rendered scenes of 64 x 64 pixels, a teacher that
has seen nothing else. `--teacher.name random` does without the teacher's run, and learns nothing of use.
Hardware: some minutes of one CPU core. Result: docs/beitv2.md.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import CheckpointConfig, OptimConfig
from beit_fast.train.tasks import teacher, vqkd

config = vqkd.TrainVqkdConfig(
    output_dir=Path("runs/train_tokenizer_vqkd_tiny_builtin"),
    steps=600,
    batch_size=32,
    batch_per_device=32,
    precision="fp32",
    eval_every=200,
    teacher=teacher.TeacherConfig(name="runs/pretrain_tiny_builtin"),
    model=vqkd.VqkdModelConfig(
        width=128, depth=4, decoder_depth=1, image_size=64, patch_size=8, vocab_size=512, code_dim=16
    ),
    data=vqkd.VqkdDataConfig(builtin_images=10_000, builtin_size=64, scale=(0.6, 1.0), threads=1),
    optim=OptimConfig(lr=1e-3, warmup_steps=30, weight_decay=1e-4, betas=(0.9, 0.99), clip_grad=None),
    checkpoint=CheckpointConfig(every_steps=200),
)

if __name__ == "__main__":
    main(config, vqkd.TrainVqkd, __doc__, demo=False)
