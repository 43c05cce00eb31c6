"""Where the time goes: the official style of the pre-training step, with one technique of beit_fast more in each row.

    pytest benchmarks/bench_waterfall.py --benchmark-only

Every row is a process of its own, in which the step with k techniques and that with k - 1 take turns; the gain of a
technique is that ratio, so it does not matter how busy the machine was while another row ran. Beside the speed stands
the error of loss and gradient against float64. The step is forward, backward, clipping and AdamW; no tokenizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.baselines.official_style import TECHNIQUES
from benchmarks.harness import OURS, Comparison, Measured, ratio_of
from benchmarks.machine import ROOT

RUNGS = ["official style", *(f"+ {name}" for name in TECHNIQUES)]


@dataclass(frozen=True)
class Case:
    config: str
    name: str
    batch_size: int
    dtype: str
    device: str
    measure: str

    @property
    def group(self) -> str:
        return f"waterfall, whole step without tokenizer: {self.name}, B={self.batch_size}, {self.dtype}"


def cases(scale: Any) -> dict[str, Case]:
    depth = scale.pick(tiny=1, cpu=2, gpu=12, full=12)
    sizes = {"width": 768, "num_heads": 12, "depth": depth}
    name = "BEiT-base plus" if depth == 12 else f"BEiT-base plus cut to {depth} blocks"
    if scale.name == "tiny":
        sizes, name = {"width": 48, "num_heads": 3, "depth": 1, "image_size": 32, "vocab_size": 64}, "toy"
    how = {"pairs": scale.pairs, "budget_s": 0.0 if scale.name == "tiny" else 3.0, "most_pairs": 31}
    batch = scale.pick(tiny=1, cpu=2, gpu=256)
    return {
        "waterfall": Case(
            json.dumps(sizes), name, batch, scale.dtype, str(scale.device),
            json.dumps(how | ({"most_pairs": 2} if scale.name == "tiny" else {})),
        )
    }  # fmt: skip


def run_rung(case: Case, number: int) -> dict[str, Any]:
    """Seconds, errors and the rest, from a fresh process."""
    techniques = ",".join(list(TECHNIQUES)[:number])
    command = [sys.executable, "-m", "benchmarks.waterfall", "--techniques", techniques, "--config", case.config,
               "--batch-size", str(case.batch_size), "--dtype", case.dtype, "--device", case.device,
               "--measure", case.measure]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


gains: dict[Case, dict[int, float]] = {}


@pytest.mark.parametrize("number", range(len(RUNGS)), ids=RUNGS)
def test_waterfall(benchmark, turns, case, number):
    turns.check_time()
    found = run_rung(case, number)
    config = json.loads(case.config)
    comparison = Comparison(case.group, {}, {"B": case.batch_size, **config}, case.dtype, images=case.batch_size)
    measured = Measured(
        comparison, torch.device(case.device), found["seconds"], peak_memory_mib=found["peak_memory_mib"],
        calls=found["calls"], load=found["load"],
    )  # fmt: skip
    row = measured.report(OURS) | {"rival": RUNGS[number], "errors": found["errors"], "rung": number}
    del row["over_beit_fast"]  # here "beit_fast" is the rung itself
    if number:
        gain = ratio_of(found["seconds"]["before"], found["seconds"][OURS])
        row["gain"] = gain._asdict() | {"what": TECHNIQUES[list(TECHNIQUES)[number - 1]]}
        gains.setdefault(case, {})[number] = gain.median
        known = gains[case]
        if len(known) == number:  # all the rungs below ran too
            product = 1.0
            for value in known.values():
                product *= value
            row["gain_so_far"] = product
    benchmark.group = case.group
    benchmark.extra_info.update(row)
    turns.replay(benchmark, found["seconds"][OURS])
