"""Peak memory of a forward pass at 1024 x 1024: nothing of (tokens, tokens) for each sample, one bias at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit_fast import BeitConfig
from benchmarks.forward_memory import bias_mib

ROOT = Path(__file__).parents[2]
SIDE = 1024
SIZE = {"depth": 3, "width": 96, "num_heads": 3}

MEASURE = """
import json, sys, torch
import beit_fast
from benchmarks.forward_memory import peak_mib
from benchmarks.baselines.libraries import timm_beit
from benchmarks.memory import PeakMemory
variant, batch, values = json.loads(sys.argv[1])
torch.set_num_threads(1)
config = beit_fast.BeitConfig(**values)
if variant != "accelerated":
    print(peak_mib(variant, config, batch, torch.device("cpu")))
else:
    model, images = beit_fast.accelerate(timm_beit(config).eval()), torch.randn(batch, 3, *config.image_hw)
    with torch.inference_mode():
        model(images[:1])
        with PeakMemory(torch.device("cpu")) as peak:
            model(images)
    print(peak.mib)
"""


def measured(variant, batch, **overrides):
    config = {**SIZE, "image_size": SIDE, "relative_position_bias": "per_block", "num_classes": 10, **overrides}
    command = [sys.executable, "-c", MEASURE, json.dumps([variant, batch, config])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1]), bias_mib(BeitConfig(**config))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be read on Linux only")
@pytest.mark.parametrize("variant", ["beit_fast", "beit_fast, resized from 224 px", "accelerated"])
def test_one_bias_at_a_time_and_none_for_a_sample(variant):
    one, bias = measured(variant, 1)
    four, _ = measured(variant, 4)
    assert 0.9 * bias < one < 1.5 * bias  # the bias of a block, and what a sample needs
    # a sample has its tokens and the MLP's four times as wide: 16 MiB here; its scores alone would be 192
    assert (four - one) / 3 < 0.25 * bias


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be read on Linux only")
def test_without_a_bias_there_is_nothing_of_that_size():
    peak, bias = measured("beit_fast", 2, relative_position_bias="none", use_abs_pos_emb=True)
    assert peak < 0.5 * bias


def test_scores_of_a_sample_are_never_written_out():
    """The largest tensor that inference makes at 1024 x 1024 is the bias of one block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from beit_fast import Beit

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    sizes.append((tensor.untyped_storage().nbytes(), str(function)))
            return out

    config = BeitConfig(depth=1, width=16, num_heads=2, image_size=SIDE, relative_position_bias="per_block")
    model, images = Beit(config).eval(), torch.randn(3, 3, SIDE, SIDE)
    with torch.inference_mode(), Sizes():
        model(images)
    tokens = config.num_patches + 1
    assert max(sizes)[0] == 2 * tokens * tokens * 4, max(sizes)
