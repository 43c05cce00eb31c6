"""Times predicted for an H200 before anything was measured there: arithmetic from bytes and FLOPs, no measurements.

They stand beside the measured ones in `make gpu-check`. Assumed: 790 TFLOP/s in bf16 matrix products, 4.3 TB/s,
pointwise kernels at 85 to 88 % of that, attention at 215 / 135 TFLOP/s forward / backward.
"""

from __future__ import annotations

# pattern of a comparison's title -> milliseconds of beit_fast
PREDICTIONS = {
    r"^pre-training, forward and backward: BEiT-base plus, 224 px, B=256, bfloat16": 55.7,
    r"^pre-training, whole step with DALL-E's tokenizer: BEiT-base plus, 224 px, B=256, bfloat16": 90.5,
    r"^pre-training, forward and backward: BEiT-large plus, 224 px, B=128, bfloat16": 87.5,
    r"^pre-training, whole step with DALL-E's tokenizer: BEiT-large plus, 224 px, B=128, bfloat16": 106.0,
    r"^options of our own step: BEiT-base plus, 224 px, B=256, bfloat16": 56.5,
    r"^tokenizer: dalle, 112 px, B=256": 33.9,
    r"^attention with a learned bias, forward and backward: B=128, N=197, H=12": 0.4,
    r"^optimizer step with clipping: BEiT-base": 0.7,
}

IMAGENET_IMAGES = 1_281_167
EPOCHS = 800


def projected_hours(images_per_s: float, gpus: int) -> float:
    """Hours of the paper's pre-training at `gpus` times the rate of one."""
    return EPOCHS * IMAGENET_IMAGES / (gpus * images_per_s) / 3600
