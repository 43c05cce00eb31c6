"""Images to visual tokens: beit_fast's encoders beside the same networks in plain torch, as their authors run them.

    pytest benchmarks/bench_tokenizer.py --benchmark-only

DALL-E's encoder has random weights here (the work is the same); the small one is the demo tokenizer that comes along.
All tokens are compared first; two logits that are nearly equal may fall either way in half precision.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.tokenizers import load_tokenizer
from beit_fast.tokenizers.base import Tokenizer
from beit_fast.tokenizers.dalle import DalleEncoder, DalleTokenizer
from beit_fast.tokenizers.discrete_vae import DiscreteVAE
from benchmarks.baselines.dalle_encoder import PlainDalleEncoder, official_tokens
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable
from benchmarks.models import same_tokens

MASKED = "beit_fast, masked positions only"
NAMES = [OURS, MASKED, "plain torch", "plain torch, channels last", "plain torch, compiled"]


@dataclass(frozen=True)
class Case:
    network: str
    batch_size: int
    side: int
    device: torch.device
    compiled: bool


def cases(scale: Any) -> dict[str, Case]:
    batches = scale.pick(tiny={"dalle": 1, "demo": 1}, cpu={"dalle": 1, "demo": 8}, gpu={"dalle": 256, "demo": 512})
    side = 32 if scale.name == "tiny" else 112
    compiled = scale.device.type == "cuda" or scale.name == "full"
    return {name: Case(name, batch, side, scale.device, compiled) for name, batch in batches.items()}


class PlainDiscreteVAE(nn.Module):
    """The official layout's encoder as nn.Modules in a row, logits for every position."""

    def __init__(self, source: DiscreteVAE) -> None:
        super().__init__()
        self.encoder = source.encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder((images - 0.5) / 0.5)


def compare(case: Case) -> Comparison:
    device, half = case.device, case.device.type == "cuda"
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(case.batch_size, 3, case.side // 4, case.side // 4, generator=generator),
                           size=(case.side, case.side), mode="bicubic").clamp(0, 1).to(device)  # fmt: skip
    grid = case.side // 8
    count = round(grid * grid * 75 / 196)
    mask = (torch.rand(case.batch_size, grid * grid, generator=generator).argsort(1) < count).to(device)
    tokenizer: Any
    if case.network == "dalle":
        encoder = DalleEncoder(8 if case.side == 32 else 256, 8192).requires_grad_(False)
        network: nn.Module = PlainDalleEncoder(encoder.state_dict(), half)
        tokenizer = DalleTokenizer(encoder).eval()
        tokenizer.to_precision(torch.float16 if half else torch.float32).to(device).prepare()
    else:
        tokenizer = load_tokenizer("demo", device=device)
        assert isinstance(tokenizer, DiscreteVAE)
        network = PlainDiscreteVAE(tokenizer)
    assert isinstance(tokenizer, Tokenizer)
    network = network.to(device)

    def plain(channels_last: bool = False, compiled: bool = False) -> Implementation:
        if compiled and not case.compiled:
            raise Unavailable("compiling takes minutes on a CPU: --full")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        own, given = copy.deepcopy(network).to(memory_format=layout), images.to(memory_format=layout)  # type: ignore[call-overload]
        forward, whole_grid = torch.compile(own) if compiled else own, torch.ones_like(mask)

        def run() -> Tensor:
            return official_tokens(forward, given, whole_grid)

        return Implementation(run, lambda: {"tokens": run().view(case.batch_size, -1)})

    def ours(masked: bool) -> Implementation:
        def run() -> Tensor:
            return tokenizer.encode(images, mask.view(-1, grid, grid) if masked else None)

        def result() -> dict[str, Tensor]:
            tokens = tokenizer.encode(images).view(case.batch_size, -1)
            return {"tokens": tokens.masked_scatter(mask, run()) if masked else tokens}

        return Implementation(run, result, info={"masked_positions": count} if masked else {})

    return Comparison(
        group=f"tokenizer: {case.network}, {case.side} px, B={case.batch_size}",
        implementations={
            OURS: lambda: ours(False),
            MASKED: lambda: ours(True),
            "plain torch": plain,
            "plain torch, channels last": lambda: plain(channels_last=True),
            "plain torch, compiled": lambda: plain(compiled=True),
        },
        shapes={"B": case.batch_size, "tokens": grid * grid, "V": tokenizer.vocab_size},
        dtype="float16" if case.network == "dalle" and half else "float32", images=case.batch_size,
        flops=2.0 * case.batch_size * tokenizer.multiply_adds(case.side, case.side),
        compared_by=lambda ours, theirs: same_tokens(ours["tokens"], theirs["tokens"]),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_encode(interleaved, case, name):
    interleaved(case, lambda: compare(case), name, 12.0)
