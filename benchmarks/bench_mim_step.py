"""BEiT's pre-training step: beit_fast beside transformers and the official style, with and without the tokenizer.

    pytest benchmarks/bench_mim_step.py --benchmark-only

Same weights, images, masks and labels for all; loss and gradients are compared before anything is timed. The first
group is a whole step: DALL-E's encoder (random weights, which cost the same), forward, backward, clipping, AdamW; the
second is forward and backward with the tokens given. All but beit_fast tokenise with the same plain encoder.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from beit_fast.tokenizers.dalle import DalleEncoder, DalleTokenizer
from benchmarks.baselines.dalle_encoder import PlainDalleEncoder, official_tokens
from benchmarks.baselines.official_style import OfficialStep, OfficialStyle, trainable
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable
from benchmarks.models import (
    LEARNING_RATE,
    MimBatch,
    MimStep,
    ModelCase,
    OfficialForwardBackward,
    OurStep,
    TransformersForwardBackward,
    exact_and_eager,
    exact_loss,
    forward_flops,
    make_batch,
    make_model,
    model_cases,
    same_tokens,
)

NAMES = [OURS, "official style", "official style, compiled", "transformers, SDPA", "transformers, eager",
         "transformers, SDPA, compiled"]  # fmt: skip
STEP_NAMES = [OURS, "official style", "transformers, SDPA, fused AdamW"]


def cases(scale: Any) -> dict[str, ModelCase]:
    return model_cases(
        scale, tiny=[("tiny", "plus", 32, 2), ("tiny", "plain", 32, 2)], cpu=[("base", "plus", 224, 1)],
        cpu_full=[("base", "plus", 224, 4), ("base", "plain", 224, 2), ("base", "plus", 384, 1),
                  ("large", "plus", 224, 1)],
        gpu=[("base", "plus", 224, 256), ("large", "plus", 224, 128)],
        gpu_full=[("base", "plain", 224, 256), ("base", "plus", 384, 64), ("large", "plus", 384, 32)],
    )  # fmt: skip


def shapes(case: ModelCase, batch: MimBatch) -> dict[str, int]:
    config = case.config
    return {"B": case.batch_size, "N": config.num_patches + 1, "M": batch.labels.shape[0], "D": config.width}


def whole_step(case: ModelCase) -> Comparison:
    """Tokenizer, forward, backward, clipping, AdamW."""
    config, dtype, device, half = case.config, case.dtype, case.device, case.device.type == "cuda"
    batch, model = make_batch(config, case.batch_size, device), make_model(config, device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    width, side = 8 if case.tiny else 256, 8 * config.grid[0]
    encoder = DalleEncoder(width, config.vocab_size).eval().requires_grad_(False)
    plain = PlainDalleEncoder(encoder.state_dict(), half).to(device)
    token_images = torch.rand(case.batch_size, 3, side, side, generator=torch.Generator().manual_seed(3)).to(device)

    def with_tokens(step: Any, tokens_of: Any) -> Implementation:
        info: dict[str, Any] = {}

        def run(check: bool = False) -> Any:
            tokens = tokens_of()
            if check:
                info.update(same_tokens(expected, tokens))
            return step(MimBatch(batch.images, batch.mask, tokens))

        return Implementation(run, lambda: {"loss": torch.as_tensor(run(check=True))}, info=info)

    def following(step: MimStep) -> Any:
        def run(given: MimBatch) -> Tensor:
            step.batch = given
            return step()

        return run

    def ours() -> Implementation:
        tokenizer = DalleTokenizer(encoder).eval()
        tokenizer.to_precision(torch.float16 if half else torch.float32).to(device).prepare()
        step = OurStep(model, batch, dtype, update=True)
        mask, rows = batch.mask.view(-1, *config.grid), step.rows[case.batch_size]
        return with_tokens(following(step), lambda: tokenizer.encode(token_images, mask, rows))

    def plain_tokens() -> Tensor:
        return official_tokens(plain, token_images, batch.mask)

    expected = plain_tokens()

    def official() -> Implementation:
        step = OfficialStep(OfficialStyle(config, trainable(state)), LEARNING_RATE, dtype=dtype)
        return with_tokens(lambda given: step(given.images, given.mask, given.labels)[0], plain_tokens)

    def transformers() -> Implementation:
        step = TransformersForwardBackward(config, state, batch, dtype, "sdpa", update=True)
        return with_tokens(following(step), plain_tokens)

    tokens = 2 * DalleTokenizer(encoder).multiply_adds(side, side)
    return Comparison(
        group=f"pre-training, whole step with DALL-E's tokenizer: {case.what}",
        implementations={OURS: ours, "official style": official, STEP_NAMES[2]: transformers},
        shapes=shapes(case, batch), dtype=case.scale.dtype, images=case.batch_size, tolerance=1e-3,
        exact=exact_loss(config, state, MimBatch(batch.images, batch.mask, expected), dtype),
        flops=case.batch_size * (3 * forward_flops(config, batch.labels.shape[0] // case.batch_size) + tokens),
    )  # fmt: skip


@pytest.mark.parametrize("name", STEP_NAMES)
def test_whole_step(interleaved, case, name):
    if case.image_size != 224 and not case.tiny:
        pytest.skip("the tokenizer's share is the same at every resolution")
    interleaved(("whole step", case), lambda: whole_step(case), name, 15.0)


def forward_backward(case: ModelCase) -> Comparison:
    config, dtype = case.config, case.dtype
    batch, model = make_batch(config, case.batch_size, case.device), make_model(config, case.device)
    state = model.state_dict()

    def given(step: MimStep) -> Implementation:
        return Implementation(step, step.result)

    def official(compiled: bool) -> Implementation:
        _only_if(case.scale.name == "full" or not compiled)
        return given(OfficialForwardBackward(config, state, batch, dtype, compiled))

    def transformers(attention: str, compiled: bool = False) -> Implementation:
        _only_if(case.scale.name == "full" or (not compiled and (attention == "sdpa" or case.everything or case.tiny)))
        return given(TransformersForwardBackward(config, state, batch, dtype, attention, compiled))

    return Comparison(
        group=f"pre-training, forward and backward: {case.what}",
        implementations={
            OURS: lambda: given(OurStep(model, batch, dtype)),
            "official style": lambda: official(False),
            "official style, compiled": lambda: official(True),
            "transformers, SDPA": lambda: transformers("sdpa"),
            "transformers, eager": lambda: transformers("eager"),
            "transformers, SDPA, compiled": lambda: transformers("sdpa", True),
        },
        shapes=shapes(case, batch), dtype=case.scale.dtype, images=case.batch_size,
        flops=3 * case.batch_size * forward_flops(config, batch.labels.shape[0] // case.batch_size),
        exact=exact_and_eager(config, state, batch, dtype),
    )  # fmt: skip


def _only_if(wanted: bool) -> None:
    if not wanted:
        raise Unavailable("takes minutes: --full")


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(interleaved, case, name):
    interleaved(("forward and backward", case), lambda: forward_backward(case), name, 15.0)
