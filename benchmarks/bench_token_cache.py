"""The pre-training step with its visual tokens given, read from the token cache, or made by the tokenizer.

    pytest benchmarks/bench_token_cache.py --benchmark-only

The same step every time (forward, backward, clipping, AdamW), and the same tokens: those of the demo tokenizer for
random images, which a real store on disk holds. Reading them verifies each record's crc32, as in a run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_fast import BeitConfig
from beit_fast.data.pretraining import PretrainBatch
from beit_fast.data.token_store import TokenStore
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train.optim import decay_groups, optimizer_step
from beit_fast.train.tasks.token_cache import TokenSource
from benchmarks.harness import OURS, Comparison, Rival
from benchmarks.mim_batches import forward_flops, make_batch, make_model

RIVALS = [OURS, "beit_fast, tokens from the cache", "beit_fast, tokens by the demo tokenizer"]
SAMPLES = 1000


@dataclass(frozen=True)
class Case:
    size: Any
    batch_size: int
    dtype: str
    device: torch.device
    tiny: bool
    folder: Path

    @property
    def config(self) -> BeitConfig:
        small: dict[str, Any] = {"width": 48, "num_heads": 3, "depth": 1, "image_size": 64} if self.tiny else {}
        return BeitConfig.from_preset(self.size, "plus", **small)


def cases(scale: Any) -> dict[str, Any]:
    sizes = scale.pick(tiny={"tiny": 2}, cpu={"base": 2}, gpu={"base": 256})
    return {f"{s}-{b}": (s, b, scale.dtype, scale.device, scale.name == "tiny") for s, b in sizes.items()}


def compare(case: Case) -> Comparison:
    config, device, dtype = case.config, case.device, getattr(torch, case.dtype)
    inputs = make_batch(config, case.batch_size, device)
    tokenizer = load_tokenizer("demo", device=device)
    h, w = config.grid
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(case.batch_size, 3, 8 * h, 8 * w, generator=generator).to(device)
    rows = inputs.mask.flatten().nonzero().squeeze(1)
    indices = np.arange(case.batch_size, dtype=np.int64) * 7 % SAMPLES
    keys = torch.zeros(case.batch_size, dtype=torch.int64, device=device)
    batch = PretrainBatch(inputs.images, images, inputs.mask.view(-1, h, w), torch.from_numpy(indices), keys, rows, 0)
    store = TokenStore(case.folder / "tokens", num_samples=SAMPLES, num_tokens=h * w, cycle=1, settings={})
    whole_grid = tokenizer.encode(images)
    store.write(0, indices, whole_grid.flatten(1).cpu().numpy())
    given, weights = whole_grid.flatten()[rows], make_model(config, device)
    source = TokenSource(tokenizer, store)

    def from_cache() -> Tensor:
        tokens, known = store.read(0, indices)
        assert known.all()
        here = torch.from_numpy(tokens.astype(np.int64)).view(-1, h, w)
        here = here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)
        return source.of(replace(batch, known_tokens=here, unknown=torch.empty(0, dtype=torch.int64)))

    def rival(tokens_of: Any) -> Rival:
        model = copy.deepcopy(weights).train()
        optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-6, fused=True)
        one = torch.ones((), device=device)

        def step() -> dict[str, Tensor]:
            tokens = tokens_of()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(batch.images, batch.mask, tokens, masked_indices=rows).loss
            loss.backward()
            optimizer_step(optimizer, one, 3.0)
            return {"loss": loss.detach(), "tokens": tokens}

        return Rival(step, step)

    return Comparison(
        group=f"pre-training step and where its tokens come from: {'toy' if case.tiny else f'BEiT-{case.size} plus'}, "
        f"{config.image_hw[0]} px, B={case.batch_size}, {case.dtype}",
        rivals={
            OURS: lambda: rival(lambda: given),
            RIVALS[1]: lambda: rival(from_cache),
            RIVALS[2]: lambda: rival(lambda: TokenSource(tokenizer, None).of(batch)),
        },
        shapes={"B": case.batch_size, "N": h * w + 1, "M": rows.shape[0], "D": config.width},
        dtype=case.dtype,
        flops=3 * case.batch_size * forward_flops(config, rows.shape[0] // case.batch_size),
        images=case.batch_size,
        tolerance=1e-5 if case.dtype == "float32" else 1e-2,
    )


@pytest.mark.parametrize("rival", RIVALS)
def test_tokens(in_turns, case, rival, tmp_path_factory):
    in_turns(case, lambda: compare(Case(*case, tmp_path_factory.mktemp("tokens"))), rival, 12.0)
