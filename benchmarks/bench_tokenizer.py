"""Images to visual tokens: beit_fast's encoders beside the same networks in plain torch, as their authors run them.

    pytest benchmarks/bench_tokenizer.py --benchmark-only

DALL-E's encoder has random weights here (the work is the same); the small one is the demo tokenizer that comes along.
The tokens of all rivals are compared first; two logits that are nearly equal may fall either way in half precision.
"""

from __future__ import annotations

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
from benchmarks.baselines.official_style import official_tokens
from benchmarks.harness import OURS, Absent, Comparison, Disagreement, Rival

MASKED = "beit_fast, masked positions only"
RIVALS = [OURS, MASKED, "plain torch", "plain torch, channels last", "plain torch, compiled"]


@dataclass(frozen=True)
class Case:
    network: str
    batch_size: int
    side: int
    device: torch.device
    compiled: bool
    budget_s: float = 12.0


def cases(scale: Any) -> dict[str, Case]:
    batches = scale.pick(tiny={"dalle": 1, "demo": 1}, cpu={"dalle": 2, "demo": 16}, gpu={"dalle": 256, "demo": 512})
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
    device = case.device
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(case.batch_size, 3, case.side // 4, case.side // 4, generator=generator),
                           size=(case.side, case.side), mode="bicubic").clamp(0, 1).to(device)  # fmt: skip
    grid = case.side // 8
    count = round(grid * grid * 75 / 196)
    order = torch.rand(case.batch_size, grid * grid, generator=generator).argsort(1)
    mask = (order < count).to(device)

    if case.network == "dalle":
        hidden = 8 if case.side == 32 else 256
        encoder = DalleEncoder(hidden, 8192).requires_grad_(False)
        state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        tokenizer: Any = DalleTokenizer(encoder)
        half = device.type == "cuda"
        tokenizer.to_precision(torch.float16 if half else torch.float32).to(device).eval()
    else:
        tokenizer = load_tokenizer("demo", device=device)

    def plain(channels_last: bool = False, compiled: bool = False) -> Rival:
        if compiled and not case.compiled:
            raise Absent("compiling takes minutes on a CPU: --full")
        network: nn.Module
        if case.network == "dalle":
            network = DalleEncoder(encoder.width, 8192).requires_grad_(False).eval()
            network.load_state_dict(state)
            if device.type == "cuda":  # as in the original: fp16 but for the output convolution
                network.half()
                network.blocks.get_submodule("output.conv").float()  # type: ignore[operator]
        else:
            assert isinstance(tokenizer, DiscreteVAE)
            network = PlainDiscreteVAE(tokenizer)
        network = network.to(device)
        given = images
        if channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            given = images.to(memory_format=torch.channels_last)
        forward: Any = torch.compile(network) if compiled else network
        whole_grid = torch.ones_like(mask)

        def run() -> Tensor:
            if case.network == "dalle":
                return official_tokens(forward, given, whole_grid)
            with torch.no_grad():
                return forward(given).argmax(1).flatten()

        return Rival(run, lambda: {"tokens": run().view(case.batch_size, -1)})

    def ours(masked: bool) -> Rival:
        def run() -> Tensor:
            return tokenizer.encode(images, mask.view(-1, grid, grid) if masked else None)

        def result() -> dict[str, Tensor]:
            tokens = tokenizer.encode(images).view(case.batch_size, -1)
            if masked:
                tokens = tokens.masked_scatter(mask, run())
            return {"tokens": tokens}

        return Rival(run, result, info={"masked_positions": count} if masked else {})

    assert isinstance(tokenizer, Tokenizer)
    return Comparison(
        group=f"tokenizer: {case.network}, {case.side} px, B={case.batch_size}",
        rivals={
            OURS: lambda: ours(False),
            MASKED: lambda: ours(True),
            "plain torch": plain,
            "plain torch, channels last": lambda: plain(channels_last=True),
            "plain torch, compiled": lambda: plain(compiled=True),
        },
        shapes={"B": case.batch_size, "tokens": grid * grid, "V": tokenizer.vocab_size},
        dtype="float16" if case.network == "dalle" and device.type == "cuda" else "float32",
        flops=2.0 * case.batch_size * tokenizer.multiply_adds(case.side, case.side),
        images=case.batch_size,
        compared_by=same_tokens,
    )


def same_tokens(ours: Any, theirs: Any) -> dict[str, float]:
    """At least 99 % equal."""
    differing = float((ours["tokens"] != theirs["tokens"]).float().mean())
    if differing > 0.01:
        raise Disagreement(f"{differing:.2%} of the tokens differ")
    return {"share_of_tokens_that_differ": differing}


@pytest.mark.parametrize("rival", RIVALS)
def test_encode(in_turns, case, rival):
    in_turns(case, lambda: compare(case), rival, case.budget_s)
