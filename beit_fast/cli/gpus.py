"""What a training takes on a GPU that is not at hand: as measured where it was, else estimated from what was.

Peak rates are the makers' dense bf16 (V100: fp16) tensor-core figures, memory what a process can allocate.
"""

import math
from dataclasses import dataclass
from typing import Literal

Work = Literal["pre-training", "training", "inference"]
"""With DALL-E's tokenizer; without one; a frozen model, forward only."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    name: str
    peak_flops_per_s: float
    memory_bytes: float


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("V100", 125e12, 31.7 * 2**30),
        Gpu("A100-40GB", 312e12, 39.4 * 2**30),
        Gpu("A100-80GB", 312e12, 79.2 * 2**30),
        Gpu("L40S", 362e12, 44.4 * 2**30),
        Gpu("RTX4090", 165e12, 23.6 * 2**30),
        Gpu("H100", 989e12, 79.1 * 2**30),
        Gpu("H200", 989e12, 139.8 * 2**30),
        Gpu("B200", 2250e12, 178 * 2**30),
    )
}


def named(name: str) -> Gpu:
    """The GPU of this name; ValueError lists those that are known."""
    gpu = GPUS.get(name.lower().replace(" ", ""))
    if gpu is None:
        raise ValueError(f"--plan-gpu {name} is not known; choose from {', '.join(g.name for g in GPUS.values())}")
    return gpu


@dataclass(frozen=True)
class Measurement:
    """What a GPU did, in bf16, without the input pipeline: of preset `plus` at 224 pixels."""

    gpu: str
    work: Work
    size: str
    width: int
    batch: int
    images_per_s: float
    share: float
    """Of the GPU's peak, by the FLOPs that `plan` counts."""
    record: str


_FIRST = "2026-11-26_nvidia-h100-80gb-hbm3_first.json"
MEASUREMENTS = (
    Measurement("H100", "pre-training", "base", 768, 256, 1655, 0.268, _FIRST),
    Measurement("H100", "pre-training", "large", 1024, 128, 812, 0.349, _FIRST),
    Measurement("H100", "training", "base", 768, 256, 3303, 0.352, _FIRST),
    Measurement("H100", "inference", "base", 768, 256, 11239, 0.399, _FIRST),
    Measurement("H100", "inference", "large", 1024, 128, 3578, 0.445, _FIRST),
)
"""From benchmarks/records; a test recomputes them. Nothing else has been measured on a GPU."""


def nearest_measurement(work: Work, width: int, batch: int) -> Measurement:
    """The measurement of such work with the nearest width and then the nearest batch, by their ratios."""

    def distance(measured: Measurement) -> tuple[float, float]:
        return abs(math.log(measured.width / width)), abs(math.log(measured.batch / batch))

    return min((m for m in MEASUREMENTS if m.work == work), key=distance)


def measured_at(gpu: Gpu, work: Work, size: str) -> Measurement | None:
    """The measurement of this very work on this GPU; None where there is none."""
    found = [m for m in MEASUREMENTS if (m.gpu, m.work, m.size) == (gpu.name, work, size)]
    return found[0] if found else None
