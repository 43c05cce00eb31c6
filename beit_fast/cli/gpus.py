"""What a training takes on a GPU that is not at hand: from records where there are, else estimated.

Peak rates are the makers' dense bf16 (V100: fp16) tensor-core figures, memory what a process can allocate.
"""

import json
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
ASSUMED_UTILISATION = 0.30
"""Share of the peak that an estimate counts on, tokenizer included; no measurement of this library stands behind it."""


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


def measured_images_per_s(gpu: Gpu, size: str, folder: Path | None = None) -> tuple[float, str] | None:
    """Images/s of beit_fast's whole pre-training step at this size, and the record; None where not measured."""
    for path in sorted((folder or RECORDS).glob(f"*{gpu.name.lower().split('-')[0]}*.json"), reverse=True):
        for entry in json.loads(path.read_text()).get("benchmarks", []):
            info = entry.get("extra_info", {})
            ours = info.get("rival") == "beit_fast" and entry.get("group", "").startswith("pre-training, whole step")
            if ours and size in entry["group"] and "images_per_s" in info:
                return float(info["images_per_s"]), path.name
    return None
