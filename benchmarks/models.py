"""Models, inputs and steps that several benchmarks share: the same weights, images, masks and labels for everyone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.models import convert_state_dict
from beit_fast.train.optim import decay_groups, optimizer_step
from benchmarks.baselines.libraries import transformers_beit
from benchmarks.baselines.official_style import OfficialStyle, trainable
from benchmarks.harness import Disagreement

LEARNING_RATE = 1e-6  # steps are timed, not trainings: weights should stay where they are
CHECKED = 2
"""Images on which results are compared with fp64."""
TABLE = "relative_position_bias_table"
CPU_BLOCKS = 4
"""Of a model on a CPU where not everything is measured, the same for everyone."""


@dataclass(frozen=True)
class ModelCase:
    """A BEiT and a batch; `scale` says where and how much."""

    size: Any
    preset: Any
    image_size: int
    batch_size: int
    scale: Any
    training: bool = True
    kind: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def tiny(self) -> bool:
        return bool(self.scale.name == "tiny")

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.scale.dtype)

    @property
    def everything(self) -> bool:
        """Whether models are whole, and slow baselines take part: minutes on a CPU."""
        return bool(self.device.type == "cuda" or self.scale.name == "full")

    @property
    def config(self) -> BeitConfig:
        smaller = {} if self.everything else {"depth": CPU_BLOCKS}
        if self.tiny:
            smaller = {"width": 48, "num_heads": 3, "depth": 2, "vocab_size": 64}
        return BeitConfig.from_preset(self.size, self.preset, image_size=self.image_size, **{**smaller, **self.changes})

    @property
    def what(self) -> str:
        name = "toy" if self.tiny else f"BEiT-{self.size}"
        preset = "" if self.kind else f" {self.preset}"
        cut = "" if self.tiny or self.everything else f" cut to {CPU_BLOCKS} blocks"
        return f"{name}{preset}{cut}, {self.image_size} px, B={self.batch_size}, {self.scale.dtype}"

    def autocast(self) -> Any:
        return autocast(self.device, self.dtype)


def model_cases(
    scale: Any, *, tiny: Iterable[tuple[Any, ...]], cpu: Iterable[tuple[Any, ...]], gpu: Iterable[tuple[Any, ...]],
    cpu_full: Iterable[tuple[Any, ...]] = (), gpu_full: Iterable[tuple[Any, ...]] = (), **more: Any,
) -> dict[str, ModelCase]:  # fmt: skip
    """Cases by id; a case is (size, preset, pixels, batch). `full` ones come on top."""
    chosen = list(scale.pick(tiny=tiny, cpu=cpu, gpu=gpu))
    if scale.name == "full":
        chosen = [*(gpu if scale.device.type == "cuda" else cpu),
                  *(gpu_full if scale.device.type == "cuda" else cpu_full)]  # fmt: skip
    return {"-".join(map(str, one)): ModelCase(*one, scale, **more) for one in chosen}


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to `dtype`; none where it is fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype not in (torch.float32, torch.float64))


def with_tables(model: nn.Module) -> nn.Module:
    """Tables that are not zero: a bias of zeros could hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(TABLE):
                parameter.normal_(std=0.3)
    return model


@dataclass(frozen=True)
class MimBatch:
    """images (B, 3, S, S), mask bool (B, N-1) with the same count in each row, labels int64 (M,) in row order."""

    images: Tensor
    mask: Tensor
    labels: Tensor

    def first(self, count: int) -> MimBatch:
        """The first images of it."""
        return self.few(0, count)

    def few(self, start: int, count: int) -> MimBatch:
        """Some images of it."""
        end, before = start + count, int(self.mask[:start].sum())
        masked = int(self.mask[start:end].sum())
        return MimBatch(self.images[start:end], self.mask[start:end], self.labels[before : before + masked])


def make_batch(config: BeitConfig, batch_size: int, device: torch.device, masked_share: float = 75 / 196) -> MimBatch:
    generator = torch.Generator().manual_seed(1)
    count = round(masked_share * config.num_patches)
    mask = torch.rand(batch_size, config.num_patches, generator=generator).argsort(1) < count
    images = torch.randn(batch_size, config.in_chans, *config.image_hw, generator=generator)
    labels = torch.randint(0, config.vocab_size, (int(mask.sum()),), generator=generator)
    return MimBatch(images.to(device), mask.to(device), labels.to(device))


def make_model(config: BeitConfig, device: torch.device) -> BeitForMaskedImageModeling:
    """Initial weights, the same at every call."""
    return copy.deepcopy(_initial_model(config)).to(device)


@functools.lru_cache(maxsize=1)  # drawing random weights takes longer than a step
def _initial_model(config: BeitConfig) -> BeitForMaskedImageModeling:
    torch.manual_seed(0)
    return with_tables(BeitForMaskedImageModeling(config))  # type: ignore[return-value]


def forward_flops(config: BeitConfig, num_masked: int) -> float:
    """FLOPs of one image's forward pass with the head at the masked positions; nothing saved is subtracted."""
    n, d = config.num_patches + 1, config.width
    block = (4 + 2 * config.mlp_ratio) * n * d * d + 2 * n * n * d
    patches = config.num_patches * d * config.in_chans * config.patch_size**2
    return 2 * (patches + config.depth * block + num_masked * d * config.vocab_size)


def compared_names(config: BeitConfig) -> tuple[str, ...]:
    """Parameters whose gradients are compared: both ends of the network, its middle, and the table."""
    middle = f"blocks.{config.depth // 2}"
    names = ("patch_embed.proj.weight", "mask_token", f"{middle}.attn.qkv.weight", f"{middle}.attn.v_bias",
             "blocks.0.mlp.fc1.bias", "norm.weight", "lm_head.weight")  # fmt: skip
    return names + ((f"rel_pos_bias.{TABLE}",) if config.relative_position_bias == "shared" else ())


class MimStep:
    """Forward and backward of masked image modelling, over given inputs; with `optimizer`, clipping and AdamW too."""

    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, config: BeitConfig, batch: MimBatch, dtype: torch.dtype) -> None:
        self.config, self.batch, self.dtype = config, batch, dtype

    def loss(self, batch: MimBatch) -> Tensor:
        raise NotImplementedError

    def named_parameters(self) -> dict[str, Tensor]:
        """By their names in the library."""
        raise NotImplementedError

    def official(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """By official names."""
        return gradients

    def backward(self, batch: MimBatch) -> Tensor:
        for parameter in self.named_parameters().values():
            parameter.grad = None
        with autocast(batch.images.device, self.dtype):
            loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip and step; nothing without an optimizer."""

    def __call__(self) -> Tensor:
        loss = self.backward(self.batch)
        self.update()
        return loss

    def result(self, images: int = CHECKED) -> dict[str, Tensor]:
        """Loss and gradients of the first images."""
        loss = self.backward(self.batch.first(images)).float()
        named = {n: p.grad.detach().clone() for n, p in self.named_parameters().items() if p.grad is not None}
        gradients = self.official(named)
        return {"loss": loss, **{name: gradients[name] for name in compared_names(self.config)}}


class OurStep(MimStep):
    """beit_fast's."""

    def __init__(
        self, model: BeitForMaskedImageModeling, batch: MimBatch, dtype: torch.dtype, update: bool = False
    ) -> None:
        super().__init__(model.config, batch, dtype)
        self.model = model.train()
        self.one = torch.ones((), device=batch.images.device)
        if update:
            self.optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=LEARNING_RATE, fused=True)
        self.rows = {len(b.mask): b.mask.flatten().nonzero().squeeze(1) for b in (batch, batch.first(CHECKED))}
        self.counts = {n: torch.tensor(float(len(r)), device=batch.images.device) for n, r in self.rows.items()}

    def named_parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def loss(self, batch: MimBatch) -> Tensor:
        n = len(batch.mask)
        output = self.model(
            batch.images, batch.mask, batch.labels, num_targets=self.counts[n], masked_indices=self.rows[n]
        )
        return output.loss

    def update(self) -> None:
        if self.optimizer is not None:
            optimizer_step(self.optimizer, self.one, 3.0)


class OfficialForwardBackward(MimStep):
    """The official style's; in fp64 without autocast, everything in it."""

    def __init__(
        self, config: BeitConfig, state: Mapping[str, Tensor], batch: MimBatch, dtype: torch.dtype,
        compiled: bool = False, techniques: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        if dtype == torch.float64:
            state = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
            batch = MimBatch(batch.images.double(), batch.mask, batch.labels)
        super().__init__(config, batch, dtype)
        self.weights = trainable(state)
        model = OfficialStyle(config, self.weights, techniques)
        self.forward = torch.compile(model.loss, dynamic=False) if compiled else model.loss

    def named_parameters(self) -> dict[str, Tensor]:
        return dict(self.weights)

    def loss(self, batch: MimBatch) -> Tensor:
        return self.forward(batch.images, batch.mask, batch.labels)[0]


class TransformersForwardBackward(MimStep):
    """That of transformers' `BeitForMaskedImageModeling`; with `update`, its user's clipping and fused AdamW."""

    def __init__(
        self, config: BeitConfig, state: Mapping[str, Tensor], batch: MimBatch, dtype: torch.dtype, attention: str,
        compiled: bool = False, update: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(config, batch, dtype)
        model = transformers_beit(config, "BeitForMaskedImageModeling", attn_implementation=attention)
        model.load_state_dict(convert_state_dict(dict(state), to="transformers"))
        self.model: nn.Module = model.to(batch.images.device).train()
        self.call: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
        if update:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)

    def named_parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def official(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_state_dict(gradients, to="official")

    def loss(self, batch: MimBatch) -> Tensor:
        return self.call(batch.images, bool_masked_pos=batch.mask, labels=batch.labels).loss

    def update(self) -> None:
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
            self.optimizer.step()


def exact_and_eager(
    config: BeitConfig, state: Mapping[str, Tensor], batch: MimBatch, dtype: torch.dtype
) -> Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]] | None:
    """`Comparison.exact` of masked image modelling by the official style; None where fp32 is compared directly."""
    if dtype == torch.float32:
        return None

    def results() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        few = batch.first(CHECKED)
        wide, narrow = (OfficialForwardBackward(config, state, few, of).result() for of in (torch.float64, dtype))
        return wide, narrow

    return results


def exact_loss(
    config: BeitConfig, state: Mapping[str, Tensor], batch: MimBatch, dtype: torch.dtype
) -> Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]] | None:
    """`Comparison.exact` of the loss of a whole batch, by the official style, some images at a time; None in fp32."""
    if dtype == torch.float32:
        return None

    def loss(of: torch.dtype) -> dict[str, Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=batch.images.device)
        for start in range(0, len(batch.mask), CHECKED):
            few = batch.few(start, CHECKED)
            step = OfficialForwardBackward(config, state, few, of)
            with torch.no_grad(), autocast(total.device, of):
                total += step.loss(step.batch).double() * len(few.labels)
        return {"loss": total / len(batch.labels)}

    return lambda: (loss(torch.float64), loss(dtype))


def same_tokens(expected: Tensor, found: Tensor) -> dict[str, float]:
    """The share of tokens that differ; `Disagreement` above 1 %: where two logits are nearly equal, either may win."""
    differing = float((expected != found).float().mean())
    if differing > 0.01:
        raise Disagreement(f"{differing:.2%} of the tokens differ")
    return {"share_of_tokens_that_differ": differing}
