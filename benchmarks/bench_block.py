"""One transformer block with its relative position bias: beit_fast beside timm and transformers.

    pytest benchmarks/bench_block.py --benchmark-only

Forward without gradients, and forward and backward with the gradient of the table; outputs and gradients are compared
before anything is timed. `plain torch` is the block of the official style.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit_fast import BeitConfig, kernels
from beit_fast.models import Beit, convert_state_dict
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.baselines.official_style import OfficialStyle, trainable
from benchmarks.harness import OURS, Comparison, Rival

RIVALS = [OURS, "timm", "transformers, SDPA", "transformers, eager", "plain torch"]
TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Case:
    side: int
    batch_size: int
    backward: bool
    dtype: str
    device: torch.device
    width: int = 768
    num_heads: int = 12
    budget_s: float = 6.0

    @property
    def config(self) -> BeitConfig:
        """A BEiT of one block."""
        return BeitConfig(
            image_size=self.side, width=self.width, num_heads=self.num_heads, depth=1,
            relative_position_bias="per_block", num_classes=0,
        )  # fmt: skip


def cases(scale: Any) -> dict[str, Case]:
    sides = scale.pick(
        tiny={32: 2}, cpu={224: 4, 384: 1}, gpu={224: 256, 384: 64, 512: 32},
        full={224: 256, 384: 64, 512: 32} if scale.device.type == "cuda" else {224: 4, 384: 2, 512: 1},
    )  # fmt: skip
    sizes = (48, 3) if scale.name == "tiny" else (768, 12)
    return {
        f"N={(side // 16) ** 2 + 1}-{'training' if backward else 'inference'}": Case(
            side, batch, backward, scale.dtype, scale.device, *sizes
        )
        for side, batch in sides.items()
        for backward in (False, True)
    }


def compare(case: Case) -> Comparison:
    config, device, dtype = case.config, case.device, getattr(torch, case.dtype)
    torch.manual_seed(0)
    model = Beit(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((TABLE, "_bias")):
                parameter.normal_(std=0.3)
    state = model.state_dict()
    n = config.num_patches + 1
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch_size, n, config.width, generator=generator).to(device).requires_grad_(case.backward)
    probe = torch.randn(case.batch_size, n, config.width, generator=generator).to(device)

    def rival(module: nn.Module | dict[str, nn.Parameter], forward: Any, table: nn.Parameter) -> Rival:
        parameters = list(module.values() if isinstance(module, dict) else module.parameters())

        def run() -> Tensor:
            with (
                torch.set_grad_enabled(case.backward),
                torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
            ):
                out = forward(x)
            if case.backward:
                for parameter in (*parameters, x):
                    parameter.grad = None
                out.backward(probe.to(out.dtype))
            return out

        def result() -> dict[str, Tensor]:
            found = {"output": run().detach().float()}
            if case.backward:
                assert x.grad is not None
                assert table.grad is not None
                found |= {"input gradient": x.grad.clone(), "table gradient": table.grad.clone()}
            return found

        return Rival(run, result)

    def ours() -> Rival:
        block = model.to(device).blocks[0]
        table = block.attn.relative_position_bias_table

        def forward(x: Tensor) -> Tensor:
            bias = kernels.relative_position_bias(table, config.grid)
            return block(x, kernels.prepare_bias(bias, dtype))

        return rival(block, forward, table)

    def timm() -> Rival:
        peer = timm_beit(config)
        peer.load_state_dict(convert_state_dict(state, to="timm"))
        block = peer.to(device).blocks[0]
        return rival(block, block, block.attn.relative_position_bias_table)

    def transformers(attention: str) -> Rival:
        peer = transformers_beit(config, "BeitModel", attn_implementation=attention, add_pooling_layer=False)
        peer.load_state_dict(
            {name.removeprefix("beit."): value for name, value in convert_state_dict(state, to="transformers").items()},
            strict=False,
        )
        block = peer.to(device).train().layers[0]
        table = block.relative_position_bias.relative_position_bias_table
        return rival(block, lambda x: block(x, resolution=config.image_hw), table)

    def plain() -> Rival:
        weights = trainable({name: tensor.to(device) for name, tensor in state.items()})
        table = weights[f"blocks.0.attn.{TABLE}"]
        official = OfficialStyle(config, {**weights, f"rel_pos_bias.{TABLE}": table})
        eps = config.layer_norm_eps

        def forward(x: Tensor) -> Tensor:
            p = official.block(0)
            normed = nn.functional.layer_norm(x, (config.width,), p["norm1.weight"], p["norm1.bias"], eps)
            return official.rest_of_block(p, x, official.attention(p, normed, official.bias(dtype)), None)[0]

        return rival(weights, forward, table)

    passes = 3 if case.backward else 1
    tokens, d = case.batch_size * n, config.width
    return Comparison(
        group=(
            f"block, {'forward and backward' if case.backward else 'forward'}: D={d}, H={config.num_heads}, N={n}, "
            f"B={case.batch_size}, {case.dtype}"
        ),
        rivals={
            OURS: ours,
            "timm": timm,
            "transformers, SDPA": lambda: transformers("sdpa"),
            "transformers, eager": lambda: transformers("eager"),
            "plain torch": plain,
        },
        shapes={"B": case.batch_size, "N": n, "D": d, "H": config.num_heads},
        dtype=case.dtype,
        flops=passes * 2.0 * ((4 + 2 * config.mlp_ratio) * tokens * d * d + 2 * tokens * n * d),
        tolerance=1e-4 if case.dtype == "float32" else 3e-2,
    )


@pytest.mark.parametrize("rival", RIVALS)
def test_block(in_turns, case, rival):
    in_turns(case, lambda: compare(case), rival, case.budget_s)
