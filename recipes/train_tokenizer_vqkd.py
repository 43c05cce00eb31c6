"""Train BEiT v2's tokenizer (VQ-KD) from CLIP ViT-B/16, 100 epochs: arXiv 2208.06366, section 2.2.

    python recipes/train_tokenizer_vqkd.py                     # built-in demo: the real networks, a few steps
    python recipes/train_tokenizer_vqkd.py --data.path /imagenet/train --dry-run
    torchrun --nproc-per-node 8 recipes/train_tokenizer_vqkd.py --data.path /imagenet/train
    python recipes/train_tokenizer_vqkd.py --teacher.name timm:vit_base_patch16_224.dino --model.decoder-depth 1 ...

8,192 codes of 32 dimensions; encoder ViT-B/16, decoder of 3 blocks. CLIP is opened by transformers, other teachers by
timm, or any BEiT of this library. Rates are the official code's: 5e-5 per 128 images, so 2e-4 at 512.
Hardware: 8 V100. Published: 97 % of the codes in use (100 % with a decoder of 1 block). Not run here: no GPU, no CLIP.
"""

import sys
from pathlib import Path

try:
    from beit_fast.cli.train import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed. `make pretrain`, or: pip install --editable '.[train]'")
from beit_fast.train.config import OptimConfig
from beit_fast.train.tasks import teacher, vqkd

config = vqkd.TrainVqkdConfig(
    output_dir=Path("runs/train_tokenizer_vqkd"),
    epochs=100,
    batch_size=512,
    batch_per_device=64,
    optim=OptimConfig(lr=2e-4, min_lr=1e-5, warmup_epochs=10, weight_decay=1e-4, betas=(0.9, 0.99), clip_grad=None),
    teacher=teacher.TeacherConfig(name="clip:openai/clip-vit-base-patch16"),
)

if __name__ == "__main__":
    main(config, vqkd.TrainVqkd, __doc__)
