"""BEiT v2's tokenizer at the size of a test, taught by an untrained BEiT."""

from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.tasks.teacher import TeacherConfig
from beit_fast.train.tasks.vqkd import (
    TrainVqkd,
    TrainVqkdConfig,
    VqkdDataConfig,
    VqkdEvaluationConfig,
    VqkdModelConfig,
)

TASK = TrainVqkd
RECIPE = TrainVqkdConfig(
    steps=8,
    batch_size=8,
    batch_per_device=4,
    precision="fp32",
    teacher=TeacherConfig(name="random"),
    model=VqkdModelConfig(width=64, depth=1, decoder_depth=1, image_size=32, patch_size=8, vocab_size=24, code_dim=8),
    data=VqkdDataConfig(builtin_images=32, builtin_size=32, threads=1),
    evaluation=VqkdEvaluationConfig(images=0),
    optim=OptimConfig(lr=1e-3, warmup_steps=1, weight_decay=1e-4, betas=(0.9, 0.99), clip_grad=None),
    checkpoint=CheckpointConfig(every_steps=2),
    log=LogConfig(every_steps=1, progress="none"),
)
