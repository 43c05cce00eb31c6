"""Go on pre-training from released weights with images of your own, labels not needed.

    beit-fast train pretrain_own_images --weights hf-hub:microsoft/beit-base-patch16-224-pt22k --data.path /data/images
    beit-fast train pretrain_own_images --weights W --data.path /data/scans --data.channels 1 --dry-run
    python recipes/pretrain_own_images.py        # built-in demo: the model from random weights, a few steps

`--weights` takes a file of the official code, timm or transformers, a name on the hub, or a run; model, patch and image
size follow it. Without `--weights` the run starts from random ones, which takes hundreds of passes over the images.
Tokens are DALL-E's; of a tokenizer of your own: `--tokenizer.name runs/tokenizer/tokenizer.safetensors`.
Learning rate, warm-up and layer decay follow the number of images that the run sees (`--steps` x `--batch-size`; the
page "Pre-train on your own images" has the table, the reasons, and what of it was tried), unless they are given.
Does it help? `--evaluation.knn /data/labelled` measures before the first step and at every evaluation.
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
    output_dir=Path("runs/pretrain_own_images"),
    steps=4000,
    batch_size=64,
    batch_per_device=64,
    eval_every=500,
    defaults_by_images_seen=True,
    data=pretrain.DataConfig(normalization="half", scale=(0.2, 1.0)),
    model=pretrain.ModelConfig(size="base", preset="plus", drop_path_rate=0.1),
    masking=pretrain.MaskingConfig(num_masked=None),
    optim=OptimConfig(lr=1.5e-3, min_lr=1e-5, weight_decay=0.05, clip_grad=3.0),
    tokenizer=pretrain.TokenizerConfig(name="dalle"),
)

if __name__ == "__main__":
    main(config, pretrain.MaskedImageModeling, __doc__)
