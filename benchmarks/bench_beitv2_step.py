"""BEiT v2's steps beside v1's: two heads, with its tokenizer and without; the tokenizer's own, with a teacher or not.

    pytest benchmarks/bench_beitv2_step.py --benchmark-only

Each is a whole step of this library: forward, backward, clipping, AdamW. Different work, so nothing is compared but
time. Tokenizers and teacher have random weights, which cost the same; the teacher is a ViT-B/16, as large as CLIP's.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from beit_fast.models import Beit, BeitConfig
from beit_fast.tokenizers.dalle import DalleEncoder, DalleTokenizer
from beit_fast.tokenizers.vqkd import VqkdTokenizer
from beit_fast.train.optim import decay_groups, optimizer_step
from beit_fast.train.tasks.teacher import Teacher
from benchmarks.harness import OURS, Comparison, Implementation
from benchmarks.models import (
    LEARNING_RATE,
    MimBatch,
    ModelCase,
    OurStep,
    forward_flops,
    make_batch,
    make_model,
    model_cases,
)

NAMES = [OURS, "beit_fast, v1 with DALL-E's tokenizer", "beit_fast, v2, tokens given",
         "beit_fast, v2 with its tokenizer", "beit_fast, v2's tokenizer, features given",
         "beit_fast, v2's tokenizer with its teacher"]  # fmt: skip


def cases(scale: Any) -> dict[str, ModelCase]:
    return model_cases(
        scale, tiny=[("tiny", "plus", 32, 2)], cpu=[("base", "plus", 224, 2)], gpu=[("base", "plus", 224, 128)]
    )


class TokenizerStep:
    """One optimizer step of BEiT v2's tokenizer, codes included."""

    def __init__(self, model: VqkdTokenizer, case: ModelCase) -> None:
        self.model, self.case = model.train(), case
        self.optimizer = torch.optim.AdamW(decay_groups(model, 1e-4), lr=LEARNING_RATE, fused=True)
        self.one = torch.ones((), device=case.device)

    def __call__(self, images: Tensor, features: Tensor) -> Tensor:
        with self.case.autocast():
            distillation, commitment = self.model(images, features, True)
        loss = (distillation + commitment).mean()
        loss.backward()
        optimizer_step(self.optimizer, self.one, None)
        self.optimizer.zero_grad()
        self.model.quantize.update(*self.model.take_recent(), 0.99)
        return loss.detach()


def compare(case: ModelCase) -> Comparison:
    config, device = case.config, case.device
    half = torch.float16 if device.type == "cuda" else torch.float32
    batch = make_batch(config, case.batch_size, device)
    h, w = config.grid
    generator = torch.Generator().manual_seed(3)
    views = torch.rand(case.batch_size, 3, *config.image_hw, generator=generator).to(device)
    token_views = torch.rand(case.batch_size, 3, 8 * h, 8 * w, generator=generator).to(device)
    mask, rows = batch.mask.view(-1, h, w), batch.mask.flatten().nonzero().squeeze(1)
    torch.manual_seed(2)
    sizes = {"width": 64, "depth": 1, "decoder_depth": 1} if case.tiny else {}
    vqkd = VqkdTokenizer(config.vocab_size, grid=h, patch_size=config.patch_size, **sizes).to(device)
    vqkd.quantize.initialise(torch.nn.functional.normalize(torch.randn(4096, 32, device=device), dim=1), rounds=0)
    two_heads = replace(config, head_layers=1 if case.tiny else 2, early_layers=config.depth * 3 // 4)

    def step(model: BeitConfig, tokens_of: Callable[[], Tensor]) -> Implementation:
        run = OurStep(make_model(model, device), batch, case.dtype, update=True)

        def one_step() -> Tensor:
            run.batch = MimBatch(batch.images, batch.mask, tokens_of())
            return run()

        return Implementation(one_step)

    def v1_with_tokenizer() -> Implementation:
        dalle = DalleTokenizer(DalleEncoder(8 if case.tiny else 256, config.vocab_size)).eval().requires_grad_(False)
        dalle.to_precision(half).to(device).prepare()
        return step(config, lambda: dalle.encode(token_views, mask, rows))

    def v2_with_tokenizer() -> Implementation:
        frozen = copy.deepcopy(vqkd).eval().requires_grad_(False).to_precision(half)
        return step(two_heads, lambda: frozen.encode(views, mask, rows))

    def tokenizer(with_teacher: bool) -> Implementation:
        plain = replace(case.config, use_abs_pos_emb=True, relative_position_bias="none", layer_scale_init=None)
        network = Beit(plain.for_classification(0, global_pool="token")).to(device).eval().requires_grad_(False)
        teacher = Teacher(
            network.to(half), lambda x: network.forward_features(x)[:, 1:], config.patch_size, h, (0.5,) * 3, (0.5,) * 3
        ).to(device)
        features = teacher(views)
        sizes_now = sizes | {"teacher_dim": features.shape[2]}
        model = VqkdTokenizer(config.vocab_size, grid=h, patch_size=config.patch_size, **sizes_now).to(device)
        model.quantize.load_state_dict(vqkd.quantize.state_dict())
        run = TokenizerStep(model, case)
        return Implementation(lambda: run(views, teacher(views) if with_teacher else features))

    return Comparison(
        group=f"pre-training step, BEiT v1 (tokens given) and v2: {case.what}",
        implementations={
            OURS: lambda: step(config, lambda: batch.labels),
            NAMES[1]: v1_with_tokenizer,
            NAMES[2]: lambda: step(two_heads, lambda: batch.labels),
            NAMES[3]: v2_with_tokenizer,
            NAMES[4]: lambda: tokenizer(False),
            NAMES[5]: lambda: tokenizer(True),
        },
        shapes={"B": case.batch_size, "N": h * w + 1, "M": rows.shape[0], "D": config.width},
        dtype=case.scale.dtype, images=case.batch_size,
        flops=3 * case.batch_size * forward_flops(config, rows.shape[0] // case.batch_size),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_steps(interleaved, case, name):
    interleaved(case, lambda: compare(case), name, 20.0)
