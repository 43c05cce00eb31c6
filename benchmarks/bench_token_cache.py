"""The pre-training step with its visual tokens given, read from the token cache, or made by the tokenizer.

    pytest benchmarks/bench_token_cache.py --benchmark-only

The same step every time (forward, backward, clipping, AdamW), and the same tokens: those of the demo tokenizer for
random images, which a real store on disk holds. Reading them verifies each record's crc32, as in a run.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_fast.data.pretraining import PretrainBatch
from beit_fast.data.token_store import TokenStore
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train.tasks.token_cache import TokenSource
from benchmarks.harness import OURS, Comparison, Implementation
from benchmarks.models import (
    MimBatch,
    ModelCase,
    OurStep,
    exact_loss,
    forward_flops,
    make_batch,
    make_model,
    model_cases,
    same_tokens,
)

NAMES = [OURS, "beit_fast, tokens from the cache", "beit_fast, tokens by the demo tokenizer"]
SAMPLES = 1000


def cases(scale: Any) -> dict[str, ModelCase]:
    return model_cases(
        scale, tiny=[("tiny", "plus", 64, 2)], cpu=[("base", "plus", 224, 2)], gpu=[("base", "plus", 224, 256)],
        changes={"vocab_size": 8192},
    )  # fmt: skip


def compare(case: ModelCase, folder: Path) -> Comparison:
    config, device = case.config, case.device
    inputs = make_batch(config, case.batch_size, device)
    tokenizer = load_tokenizer("demo", device=device)
    h, w = config.grid
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(case.batch_size, 3, 8 * h, 8 * w, generator=generator).to(device)
    rows = inputs.mask.flatten().nonzero().squeeze(1)
    indices = np.arange(case.batch_size, dtype=np.int64) * 7 % SAMPLES
    keys = torch.zeros(case.batch_size, dtype=torch.int64, device=device)
    batch = PretrainBatch(inputs.images, images, inputs.mask.view(-1, h, w), torch.from_numpy(indices), keys, rows, 0)
    store = TokenStore(folder / "tokens", num_samples=SAMPLES, num_tokens=h * w, cycle=1, settings={})
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

    def with_tokens(tokens_of: Any) -> Implementation:
        step = OurStep(copy.deepcopy(weights), inputs, case.dtype, update=True)

        def run() -> dict[str, Tensor]:
            step.batch = MimBatch(inputs.images, inputs.mask, tokens_of())
            return {"loss": step()}

        return Implementation(run, run, info=same_tokens(given, tokens_of()))

    return Comparison(
        group=f"pre-training step and where its tokens come from: {case.what}",
        implementations={
            OURS: lambda: with_tokens(lambda: given),
            NAMES[1]: lambda: with_tokens(from_cache),
            NAMES[2]: lambda: with_tokens(lambda: TokenSource(tokenizer, None).of(batch)),
        },
        shapes={"B": case.batch_size, "N": h * w + 1, "M": rows.shape[0], "D": config.width},
        dtype=case.scale.dtype, images=case.batch_size, tolerance=1e-5,
        exact=exact_loss(config, weights.state_dict(), MimBatch(inputs.images, inputs.mask, given), case.dtype),
        flops=3 * case.batch_size * forward_flops(config, rows.shape[0] // case.batch_size),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tokens(interleaved, case, name, tmp_path_factory):
    interleaved(case, lambda: compare(case, tmp_path_factory.mktemp("tokens")), name, 12.0)
