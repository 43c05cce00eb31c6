"""A fine-tuning and a segmentation on two processes (`-m two_tasks FOLDER PORT PORT`), and their configurations."""

import os
import sys
import traceback
from pathlib import Path

import torch._dynamo  # noqa: F401 - an optimizer's first step imports it: once here, not in both forked processes

from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.tasks.finetune import (
    AugmentConfig,
    ClassifierModelConfig,
    Finetune,
    FinetuneConfig,
    LabelledDataConfig,
)
from beit_fast.train.tasks.segment import (
    CropConfig,
    Segment,
    SegmentationDataConfig,
    SegmentationModelConfig,
    SegmentConfig,
)


def tasks(folder, name):
    """Both tasks, their runs in folders of this name."""
    common = {
        "scratch": True, "batch_size": 8, "device": "cpu", "checkpoint": CheckpointConfig(every_steps=2),
        "log": LogConfig(every_steps=2, progress="none"),
    }  # fmt: skip
    data = {"builtin_images": 16, "cache_dir": str(folder / "cache"), "threads": 1}
    shape = {"size": "tiny", "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
    yield Finetune(
        FinetuneConfig(
            output_dir=folder / name / "finetune",
            steps=4,
            batch_per_device=2,
            data=LabelledDataConfig(builtin_size=32, builtin_validation_images=23, **data),
            model=ClassifierModelConfig(width=32, drop_path_rate=0.3, init_std=0.1, **shape),
            augment=AugmentConfig(repeats=1),
            optim=OptimConfig(lr=1e-2, warmup_steps=1, clip_grad=None, eps=1e-3),
            **common,
        )
    )
    yield Segment(
        SegmentConfig(
            output_dir=folder / name / "segment",
            steps=3,
            batch_per_device=8,  # batch norms see a whole step: its part on both processes
            data=SegmentationDataConfig(builtin_size=48, builtin_validation_images=5, **data),
            model=SegmentationModelConfig(width=16, channels=8, auxiliary_channels=8, dropout=0.0, **shape),
            crops=CropConfig(base=(48, 48), ratio=(1.0, 1.0)),
            optim=OptimConfig(lr=1e-2, warmup_steps=1, clip_grad=None, eps=1e-3, schedule="poly"),
            **common,
        )
    )


def run(rank, folder, ports):
    for task, port in zip(tasks(folder, "two"), ports, strict=True):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port}  # fmt: skip
        assert engine.run(task).exit_code == 0


if __name__ == "__main__":
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                run(rank, Path(sys.argv[1]), sys.argv[2:])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
