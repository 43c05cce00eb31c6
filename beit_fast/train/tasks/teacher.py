"""Teachers of BEiT v2's tokenizer: frozen networks that give a feature for every patch of an image."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.data.arrays.statistics import normalization_of
from beit_fast.models import Beit, BeitConfig
from beit_fast.train.config import local
from beit_fast.train.tasks.model import ModelConfig, half_on_gpu
from beit_fast.train.tasks.weights import describe_weights, load_weights

CLIP_MEAN_AND_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The network whose features are to be reproduced."""

    name: str = local("clip:openai/clip-vit-base-patch16", free=False)
    """`clip:NAME_OR_FOLDER`: the image side of a CLIP that transformers opens, its patch tokens projected. `timm:NAME`:
    a Vision Transformer of timm (timm:vit_base_patch16_224.dino, timm:vit_base_patch14_dinov2). A run, a file or a name
    of weights: a BEiT. `random`: an untrained tiny BEiT, always the same, to try things."""
    normalization: str | None = None
    """Mean and standard deviation of its pixels: `imagenet`, `half`, or a file that `beit-fast stats` wrote. None: what
    the teacher says; a file of weights that says nothing takes `half`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of its layers. `auto`: fp32 on the CPU, fp16 on a GPU."""


class Teacher(nn.Module):
    """A frozen network with its own normalisation, on a grid of patches.

    Args:
        network: any module, which `patch_tokens` calls.
        patch_tokens: gives (B, grid * grid, T) for normalised images (B, 3, S, S), S = grid * patch_size.
        patch_size: pixels along a side of its patches.
        grid: patches along a side. Images of another size are resized (bicubic, antialiased).
        mean, std: of its pixels.
    """

    def __init__(
        self, network: nn.Module, patch_tokens: Callable[[Tensor], Tensor], patch_size: int, grid: int,
        mean: tuple[float, ...], std: tuple[float, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.patch_tokens, self.side = network, patch_tokens, grid * patch_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Give float32 (B, grid * grid, T) for images (B, 3, H, W) in [0, 1]."""
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        dtype = next(self.network.parameters()).dtype
        return self.patch_tokens(((images - self.mean) / self.std).to(dtype)).float()

    def sha256(self) -> str:
        """The hash of its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def open_teacher(config: TeacherConfig, grid: int, device: torch.device, pretrained: bool = True) -> Teacher:
    """The teacher of a configuration, frozen, in evaluation mode, on a grid of patches.

    Args:
        grid: patches along a side; position embeddings are interpolated to it.
        pretrained: False leaves out weights that would be fetched: as large and as fast, for plans.

    Raises:
        ValueError: it cannot be opened; ModuleNotFoundError: the library that knows it is not installed.
    """
    kind, _, name = config.name.partition(":")
    if config.name == "random":
        teacher = _random(grid)
    elif kind in ("clip", "timm") and name:
        try:
            teacher = (_clip if kind == "clip" else _timm)(name, grid, pretrained)
        except ImportError as error:
            library = "transformers" if kind == "clip" else "timm"
            raise ModuleNotFoundError(
                f"--teacher.name {config.name} needs {library} ({error}): pip install {library}"
            ) from None
        except Exception as error:  # whatever a library raises for a name, a file or a network that is not there
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--teacher.name {config.name} cannot be opened: {reason}; give the folder of a CLIP, a name of timm, "
                "or weights of a BEiT"
            ) from error
    else:
        teacher = _beit(config.name, grid)
    if config.normalization is not None:
        values = normalization_of(config.normalization, None)
        teacher.mean, teacher.std = (torch.tensor(value)[:, None, None] for value in values)
    teacher.network.to(half_on_gpu(config.precision, device))
    return teacher.to(device).eval().requires_grad_(False)


def _of_beit(backbone: Beit, grid: int, normalization: str) -> Teacher:
    def patch_tokens(images: Tensor) -> Tensor:
        return backbone.forward_features(images)[:, 1:]

    return Teacher(backbone, patch_tokens, backbone.config.patch_size, grid, *normalization_of(normalization, None))


def _beit(path: str, grid: int) -> Teacher:
    """The blocks and the last norm of pre-trained weights."""
    there = describe_weights(path)
    if there.data:
        raise ValueError(
            f"--teacher.name {path}: its images have channels or a range of their own; take one of RGB images"
        )
    config = ModelConfig(**there.model).architecture(BeitConfig.vocab_size)
    backbone = Beit(config.for_classification(0, global_pool="token"))
    load_weights(backbone, path, verbose=False)
    return _of_beit(backbone, grid, there.normalization or "half")


def _random(grid: int) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BeitConfig.from_preset("tiny", "plain", depth=2, image_size=16 * grid, init_std=0.1)
        return _of_beit(Beit(config.for_classification(0, global_pool="token")), grid, "half")


def _timm(name: str, grid: int, pretrained: bool) -> Teacher:
    import timm

    (patch_size, _) = timm.create_model(name, pretrained=False, num_classes=0).patch_embed.patch_size
    network: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=grid * patch_size)

    def patch_tokens(images: Tensor) -> Tensor:
        tokens: Tensor = network.forward_features(images)[:, network.num_prefix_tokens :]
        return tokens

    known = network.pretrained_cfg
    return Teacher(network, patch_tokens, patch_size, grid, tuple(known["mean"]), tuple(known["std"]))


def _clip(name: str, grid: int, pretrained: bool) -> Teacher:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    network: Any
    if pretrained:
        network = CLIPVisionModelWithProjection.from_pretrained(name)
    else:
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=16, projection_dim=512))

    def patch_tokens(images: Tensor) -> Tensor:
        # as the official code: the norm that CLIP has for its class token, then its projection
        vision = network.vision_model
        tokens = vision(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        projected: Tensor = network.visual_projection(vision.post_layernorm(tokens))
        return projected

    return Teacher(network, patch_tokens, network.config.patch_size, grid, *CLIP_MEAN_AND_STD)
