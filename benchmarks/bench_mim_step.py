"""BEiT's pre-training step: beit_fast beside transformers and the official style, with and without the tokenizer.

    pytest benchmarks/bench_mim_step.py --benchmark-only

Same weights, images, masks and labels for all; loss and gradients are compared before anything is timed. The first
group is forward and backward with the tokens given, the second a whole step: DALL-E's encoder (random weights, which
cost the same), forward, backward, clipping, AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from beit_fast import BeitConfig
from beit_fast.tokenizers.dalle import DalleEncoder, DalleTokenizer
from beit_fast.train.optim import decay_groups, optimizer_step
from benchmarks.baselines.official_style import OfficialStep, OfficialStyle, official_tokens, trainable
from benchmarks.harness import OURS, Absent, Comparison, Rival
from benchmarks.mim_batches import (
    OfficialForwardBackward,
    OurStep,
    TransformersForwardBackward,
    forward_flops,
    make_batch,
    make_model,
)

LEARNING_RATE = 1e-6  # the step is timed, not the training: weights should stay where they are


@dataclass(frozen=True)
class Case:
    size: Any
    preset: Any
    image_size: int
    batch_size: int
    dtype: str
    device: torch.device
    tiny: bool = False
    all_rivals: bool = False
    """Compiled ones too, and transformers without SDPA."""
    budget_s: float = 15.0

    @property
    def config(self) -> BeitConfig:
        small = {"width": 48, "num_heads": 3, "depth": 2, "vocab_size": 64} if self.tiny else {}
        return BeitConfig.from_preset(self.size, self.preset, image_size=self.image_size, **small)

    @property
    def what(self) -> str:
        name = "toy" if self.tiny else f"BEiT-{self.size}"
        return f"{name} {self.preset}, {self.image_size} px, B={self.batch_size}, {self.dtype}"


def cases(scale: Any) -> dict[str, Case]:
    gpu = scale.device.type == "cuda"
    if scale.name == "tiny":
        grid = [("tiny", preset, 32, 2) for preset in ("plus", "plain")]
    elif not gpu:
        grid = [("base", "plus", 224, 1)]
        if scale.name == "full":
            grid += [("base", "plus", 224, 4), ("base", "plain", 224, 2), ("base", "plus", 384, 1),
                     ("large", "plus", 224, 1)]  # fmt: skip
    else:
        grid = [("base", "plus", 224, 256), ("large", "plus", 224, 128)]
        if scale.name == "full":
            grid += [("base", "plain", 224, 256), ("base", "plus", 384, 64), ("large", "plus", 384, 32)]
    return {
        f"{size}-{preset}-{side}-B={batch}": Case(
            size, preset, side, batch, scale.dtype, scale.device, scale.name == "tiny", gpu or scale.name == "full"
        )
        for size, preset, side, batch in grid
    }


RIVALS = [
    OURS,
    "official style",
    "official style, compiled",
    "transformers, SDPA",
    "transformers, eager",
    "transformers, SDPA, compiled",
]


def forward_backward(case: Case) -> Comparison:
    config, dtype = case.config, getattr(torch, case.dtype)
    batch = make_batch(config, case.batch_size, case.device)
    model = make_model(config, case.device).train()
    state = model.state_dict()

    def ours() -> Rival:
        step = OurStep(model, batch, dtype)
        return Rival(step, step.result)

    def official(compiled: bool) -> Rival:
        _only_if(not compiled or case.all_rivals)
        step = OfficialForwardBackward(config, state, batch, dtype, compiled)
        return Rival(step, step.result)

    def transformers(attention: str, compiled: bool = False) -> Rival:
        _only_if(attention == "sdpa" or case.all_rivals or case.tiny)
        _only_if(not compiled or case.all_rivals)
        step = TransformersForwardBackward(config, state, batch, dtype, attention, compiled)
        return Rival(step, step.result)

    return Comparison(
        group=f"pre-training, forward and backward: {case.what}",
        rivals={
            OURS: ours,
            "official style": lambda: official(False),
            "official style, compiled": lambda: official(True),
            "transformers, SDPA": lambda: transformers("sdpa"),
            "transformers, eager": lambda: transformers("eager"),
            "transformers, SDPA, compiled": lambda: transformers("sdpa", True),
        },
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "M": batch.labels.shape[0], "D": config.width},
        dtype=case.dtype,
        flops=3 * case.batch_size * forward_flops(config, batch.labels.shape[0] // case.batch_size),
        images=case.batch_size,
        tolerance=1e-4 if case.dtype == "float32" else 5e-2,
    )


def _only_if(wanted: bool) -> None:
    if not wanted:
        raise Absent("takes minutes on a CPU: --full")


@pytest.mark.parametrize("rival", RIVALS)
def test_forward_and_backward(in_turns, case, rival):
    in_turns(("forward and backward", case), lambda: forward_backward(case), rival, case.budget_s)


STEP_RIVALS = [OURS, "official style", "transformers, SDPA, fused AdamW"]


def whole_step(case: Case) -> Comparison:
    """Tokenizer, forward, backward, clipping, AdamW."""
    config, dtype, device = case.config, getattr(torch, case.dtype), case.device
    batch = make_batch(config, case.batch_size, device)
    model = make_model(config, device).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    hidden, vocab = (8, config.vocab_size) if case.tiny else (256, config.vocab_size)
    encoder = DalleEncoder(hidden, vocab).to(device).eval().requires_grad_(False)
    side = 8 * config.grid[0]
    token_images = torch.rand(case.batch_size, 3, side, side, generator=torch.Generator().manual_seed(3)).to(device)
    grid = config.grid

    def ours() -> Rival:
        tokenizer = DalleTokenizer(DalleEncoder(hidden, vocab)).eval().requires_grad_(False)
        assert tokenizer.encoder is not None
        tokenizer.encoder.load_state_dict(encoder.state_dict())
        tokenizer.to_precision(torch.float16 if device.type == "cuda" else torch.float32).to(device)
        optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=LEARNING_RATE, fused=True)
        one = torch.ones((), device=device)
        rows = batch.mask.flatten().nonzero().squeeze(1)

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            tokens = tokenizer.encode(token_images, batch.mask.view(-1, *grid), rows)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                output = model(batch.images, batch.mask, tokens, masked_indices=rows)
            output.loss.backward()
            optimizer_step(optimizer, one, 3.0)
            return output.loss.detach(), tokens

        return Rival(step, lambda: dict(zip(("loss", "tokens"), step(), strict=True)))

    def official() -> Rival:
        official_encoder = DalleEncoder(hidden, vocab).eval().requires_grad_(False)
        official_encoder.load_state_dict(encoder.state_dict())
        if device.type == "cuda":  # as in the original: fp16 but for the output convolution
            official_encoder.half()
            official_encoder.blocks.get_submodule("output.conv").float()
        official_encoder.to(device)
        step = OfficialStep(OfficialStyle(config, trainable(state)), LEARNING_RATE, dtype=dtype)

        def run() -> tuple[Any, torch.Tensor]:
            tokens = official_tokens(official_encoder, token_images, batch.mask)
            return step(batch.images, batch.mask, tokens)[0], tokens

        return Rival(run, lambda: _named(*run()))

    def transformers() -> Rival:
        inner = TransformersForwardBackward(config, state, batch, dtype, "sdpa")
        optimizer = torch.optim.AdamW(inner.model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            tokens = official_tokens(encoder, token_images, batch.mask)
            inner.batch = type(batch)(batch.images, batch.mask, tokens)
            inner()
            torch.nn.utils.clip_grad_norm_(inner.model.parameters(), 3.0)
            optimizer.step()
            return inner.loss.detach(), tokens

        return Rival(run, lambda: _named(*run()))

    tokenizer = DalleTokenizer(encoder)
    masked = batch.labels.shape[0] // case.batch_size
    return Comparison(
        group=f"pre-training, whole step with DALL-E's tokenizer: {case.what}",
        rivals={OURS: ours, "official style": official, "transformers, SDPA, fused AdamW": transformers},
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "M": batch.labels.shape[0], "D": config.width},
        dtype=case.dtype,
        flops=case.batch_size * (3 * forward_flops(config, masked) + 2 * tokenizer.multiply_adds(side, side)),
        images=case.batch_size,
        compared_by=_same_step,
    )


def _named(loss: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": torch.as_tensor(loss, dtype=torch.float32), "tokens": tokens}


def _same_step(ours: Any, theirs: Any) -> dict[str, float]:
    """Loss within 1 %: a token that flips where two logits are nearly equal moves it by about 1e-4."""
    from benchmarks.harness import Disagreement

    differing = float((ours["tokens"] != theirs["tokens"]).float().mean())
    difference = abs(float(ours["loss"]) / float(theirs["loss"]) - 1)
    if differing > 0.01 or not difference <= 0.01:
        raise Disagreement(f"{differing:.2%} of the tokens and {difference:.2e} of the loss differ")
    return {"share_of_tokens_that_differ": differing, "loss": difference}


@pytest.mark.parametrize("rival", STEP_RIVALS)
def test_whole_step(in_turns, case, rival):
    if case.image_size != 224 and not case.tiny:
        pytest.skip("the tokenizer's share is the same at every resolution")
    in_turns(("whole step", case), lambda: whole_step(case), rival, case.budget_s)
