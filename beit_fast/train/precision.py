"""The autocast type of a run."""

import torch

from beit_fast.train.config import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precision_of(config: RunConfig, device: torch.device) -> str:
    """`auto` is bf16 where the GPU has it, fp16 on older GPUs, fp32 on the CPU."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a run of this precision calls its model."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
