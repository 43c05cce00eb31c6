"""Peak memory of one forward pass without gradients, beyond model and images, of beit_fast, timm and transformers.

    python -m benchmarks.forward_memory            # BEiT-B at 224, 512 and 1024 px, batches of 1 and 2
    python -m benchmarks.forward_memory --json FILE

Each number is made in a process of its own. At 1024 px a base model has 4097 tokens: one tensor of (heads, tokens,
tokens) in fp32 is 768 MiB. The bias of one block is such a tensor, and none other may be, least of all one per sample:
`tests/models/test_memory.py` bounds it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from beit_fast import Beit, BeitConfig
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.machine import environment
from benchmarks.memory import PeakMemory

NAMES = ("beit_fast", "beit_fast, resized from 224 px", "timm", "transformers")


def bias_mib(config: BeitConfig) -> float:
    """Size of one (H, N, N) tensor in float32."""
    return config.num_heads * (config.num_patches + 1) ** 2 * 4 / 2**20


def peak_mib(name: str, config: BeitConfig, batch_size: int, device: torch.device) -> float:
    """MiB of the second forward pass: the first fills caches that stay, and warms up."""
    if name == "timm":
        model = timm_beit(config)
    elif name == "transformers":
        model = transformers_beit(config, "BeitForImageClassification")
    else:
        learned_at = BeitConfig.from_preset("base").image_size if "resized" in name else config.image_size
        model = Beit(replace(config, image_size=learned_at))
    model = model.to(device).eval()
    images = torch.randn(batch_size, config.in_chans, *config.image_hw, device=device)
    with torch.inference_mode():
        model(images[:1])
        with PeakMemory(device) as peak:
            model(images)
    if peak.mib is None:
        raise SystemExit("the peak of a process's memory can be read on Linux only")
    return peak.mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="base")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write a record there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.one:
        name, side, batch = json.loads(options.one)
        config = BeitConfig.from_preset(options.size, image_size=side).for_classification()
        print(peak_mib(name, config, batch, device))
        return
    rows = []
    for side in options.sides:
        config = BeitConfig.from_preset(options.size, image_size=side).for_classification()
        for batch in options.batches:
            for name in NAMES:
                if "resized" in name and side == 224:
                    continue
                command = [sys.executable, "-m", "benchmarks.forward_memory", "--device", options.device]
                command += ["--size", options.size, "--one", json.dumps([name, side, batch])]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                row = {"rival": name, "image_size": side, "B": batch, "N": config.num_patches + 1,
                       "peak_mib": float(done.stdout.split()[-1]), "one_bias_mib": bias_mib(config)}  # fmt: skip
                rows.append(row)
                print(
                    f"{side:5d} px  B={batch}  N={row['N']:5d}  {row['peak_mib']:7.0f} MiB  "
                    f"(one (H, N, N): {row['one_bias_mib']:.0f} MiB)  {name}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"forward_memory": rows, "beit_fast": environment(device)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
