"""Inputs and models of the pre-training benchmarks: the same weights, images, masks and labels for every rival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.models import convert_state_dict
from benchmarks.baselines.libraries import transformers_beit
from benchmarks.baselines.official_style import OfficialStyle, trainable


@dataclass(frozen=True)
class MimBatch:
    """images (B, 3, S, S), mask bool (B, N-1) with the same count in each row, labels int64 (M,) in row order."""

    images: Tensor
    mask: Tensor
    labels: Tensor


def make_batch(config: BeitConfig, batch_size: int, device: torch.device, masked_share: float = 75 / 196) -> MimBatch:
    generator = torch.Generator().manual_seed(1)
    count = round(masked_share * config.num_patches)
    order = torch.rand(batch_size, config.num_patches, generator=generator).argsort(1)
    mask = order < count
    images = torch.randn(batch_size, config.in_chans, *config.image_hw, generator=generator)
    labels = torch.randint(0, config.vocab_size, (int(mask.sum()),), generator=generator)
    return MimBatch(images.to(device), mask.to(device), labels.to(device))


def make_model(config: BeitConfig, device: torch.device) -> BeitForMaskedImageModeling:
    """Initial weights, but for tables that are not zero: a bias of zeros could hide a mistake."""
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_(std=0.3)
    return model.to(device)


def forward_flops(config: BeitConfig, num_masked: int) -> float:
    """FLOPs of one image's forward pass with the head at the masked positions; nothing saved is subtracted."""
    n, d = config.num_patches + 1, config.width
    block = (4 + 2 * config.mlp_ratio) * n * d * d + 2 * n * n * d
    patches = config.num_patches * d * config.in_chans * config.patch_size**2
    return 2 * (patches + config.depth * block + num_masked * d * config.vocab_size)


def probe_names(config: BeitConfig) -> tuple[str, ...]:
    """Parameters whose gradients are compared: both ends of the network, its middle, and the table."""
    middle = f"blocks.{config.depth // 2}"
    names = ("patch_embed.proj.weight", "mask_token", f"{middle}.attn.qkv.weight", f"{middle}.attn.v_bias",
             "blocks.0.mlp.fc1.bias", "norm.weight", "lm_head.weight")  # fmt: skip
    table = ("rel_pos_bias.relative_position_bias_table",) if config.relative_position_bias == "shared" else ()
    return names + table


class OurStep:
    """Forward and backward of beit_fast's model."""

    def __init__(self, model: BeitForMaskedImageModeling, batch: MimBatch, dtype: torch.dtype) -> None:
        self.model, self.batch, self.dtype = model, batch, dtype
        self.rows = batch.mask.flatten().nonzero().squeeze(1)
        self.loss: Tensor

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        b = self.batch
        with torch.autocast(b.images.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            self.loss = self.model(b.images, b.mask, b.labels, masked_indices=self.rows).loss
        self.loss.backward()

    def result(self) -> dict[str, Tensor]:
        self()
        named = dict(self.model.named_parameters())
        return {"loss": self.loss.detach().float(), **{n: _grad(named[n]) for n in probe_names(self.model.config)}}


class OfficialForwardBackward:
    """The same in the official style, optionally compiled."""

    def __init__(
        self, config: BeitConfig, state: dict[str, Tensor], batch: MimBatch, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        self.config, self.batch, self.dtype = config, batch, dtype
        self.weights = trainable(state)
        model = OfficialStyle(config, self.weights)
        self.forward = torch.compile(model.loss) if compiled else model.loss
        self.loss: Tensor

    def __call__(self) -> None:
        for parameter in self.weights.values():
            parameter.grad = None
        b = self.batch
        with torch.autocast(b.images.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            self.loss = self.forward(b.images, b.mask, b.labels)[0]
        self.loss.backward()

    def result(self) -> dict[str, Tensor]:
        self()
        return {"loss": self.loss.detach().float(), **{n: _grad(self.weights[n]) for n in probe_names(self.config)}}


class TransformersForwardBackward:
    """transformers' `BeitForMaskedImageModeling` with the same weights."""

    def __init__(
        self,
        config: BeitConfig,
        state: dict[str, Tensor],
        batch: MimBatch,
        dtype: torch.dtype,
        attention: str,
        compiled: bool = False,
    ) -> None:
        self.config, self.batch, self.dtype = config, batch, dtype
        peer = transformers_beit(config, "BeitForMaskedImageModeling", attn_implementation=attention)
        peer.load_state_dict(convert_state_dict(state, to="transformers"))
        self.model: nn.Module = peer.to(batch.images.device).train()
        self.call: Any = torch.compile(self.model) if compiled else self.model
        self.loss: Tensor

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        b = self.batch
        with torch.autocast(b.images.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            self.loss = self.call(b.images, bool_masked_pos=b.mask, labels=b.labels).loss
        self.loss.backward()

    def result(self) -> dict[str, Tensor]:
        self()
        grads = {n: _grad(p) for n, p in self.model.named_parameters()}
        ours = convert_state_dict(grads, to="official")
        return {"loss": self.loss.detach().float(), **{n: ours[n] for n in probe_names(self.config)}}


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach().clone()
