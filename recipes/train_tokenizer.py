"""Train a small image tokenizer: 8192 visual tokens of 8 x 8 pixels, 2.4 MB.

    python recipes/train_tokenizer.py                                        # the demo tokenizer, on built-in images
    python recipes/train_tokenizer.py --data.path /data/images --steps 20000 --hidden-dim 128
    python recipes/train_tokenizer.py --objective dvae --data.path /data/images --steps 3000000 --batch-size 512 \\
        --hidden-dim 256 --optim.lr 1e-4 --optim.min-lr 1.25e-6 --optim.ema-decay 0.999    # the paper's tokenizer

Not the paper's tokenizer: BEiT uses DALL-E's (`load_tokenizer("dalle")`), which took 64 V100 to train. This one shows
the whole pipeline without a download, and is a start for data that DALL-E's has never seen. `--objective dvae` is
DALL-E's own (its layout, Gumbel-softmax, logit-Laplace likelihood, KL and temperature schedules); every run reports
reconstruction error and perplexity, `beit-fast visualize codes RUN/encoder.safetensors` draws its codes.
Hardware: one CPU core is enough. Result: beit_fast/tokenizers/weights/MODEL_CARD.md.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import CheckpointConfig, OptimConfig
from beit_fast.train.tasks import dvae, tokenizer

config = tokenizer.TrainTokenizerConfig(
    output_dir=Path("runs/train_tokenizer"),
    steps=1500,
    batch_size=8,
    batch_per_device=8,
    precision="fp32",
    eval_every=500,
    optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=50, weight_decay=1e-4, clip_grad=1.0),
    checkpoint=CheckpointConfig(every_steps=200),
)

if __name__ == "__main__":
    main(config, dvae.tokenizer_task, __doc__)
