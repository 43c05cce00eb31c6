"""BEiT v2's tokenizer, vector-quantised knowledge distillation (Peng et al., arXiv 2208.06366, section 2).

A Vision Transformer gives each patch a code of unit length, a small one turns the codes into the features of a teacher.
State-dict keys are those of the released files; where training differs from the official code: docs/beitv2.md.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.kernels.linear_argmax import linear_argmax
from beit_fast.models import Beit, BeitConfig
from beit_fast.tokenizers.base import Tokenizer, TokenizerError

__all__ = ["CosineQuantizer", "VqkdTokenizer"]

_FIXED_POINT = 2.0**32
"""Features are summed as integers of this scale: exact, hence the same in any order and on any number of ranks."""
_HEAD_DIM = 64


class _Codes(nn.Module):
    """The codes and what the released files keep beside them; only `weight` and `initted` are used."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.initted: Tensor
        self.register_buffer("weight", torch.zeros(vocab_size, dim))
        self.register_buffer("cluster_size", torch.zeros(vocab_size))
        self.register_buffer("embed_avg", torch.zeros(vocab_size, dim))
        self.register_buffer("initted", torch.zeros(1))


class CosineQuantizer(nn.Module):
    """A codebook on the unit sphere that follows the features it wins; its whole state lies in buffers.

    Args:
        vocab_size: codes V.
        dim: of a code, d.
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.cluster_size: Tensor
        self.register_buffer("cluster_size", torch.zeros(vocab_size))
        self.embedding = _Codes(vocab_size, dim)

    @property
    def codes(self) -> Tensor:
        """(V, d), of unit length once there are any."""
        return self.embedding.weight

    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (V, d) and bias (V,) of a linear layer whose arg-max is the nearest code: the largest cosine."""
        return self.codes, torch.zeros_like(self.cluster_size)

    def nearest(self, z: Tensor) -> Tensor:
        """z (P, d) of unit length -> int64 (P,); of codes at the same distance the lowest index."""
        return linear_argmax(z, *self.head())

    @torch.no_grad()
    def initialise(self, z: Tensor, rounds: int = 10) -> None:
        """Start from k-means by cosine on the features z (P, d) of every rank, of equal number, taken in their order.

        It begins with features drawn by torch's generator, which has to be in the same state on all ranks. A code that
        wins nothing keeps its feature; where there are fewer features than codes, some come more than once.
        """
        z = _gathered(z)
        count = len(self.codes)
        drawn = torch.randperm(len(z)) if len(z) >= count else torch.randint(len(z), (count,))
        self.codes.copy_(z[drawn[:count].to(z.device)])
        for _ in range(rounds):
            self._move(*self._hits(z, self.nearest(z)), share=1.0)
        if dist.is_initialized():
            dist.broadcast(self.codes, 0)
        self.embedding.initted.fill_(1)

    @torch.no_grad()
    def update(self, z: Tensor, ids: Tensor, decay: float) -> None:
        """Move every code that was hit towards the mean direction of its features, over all ranks; count the hits.

        Args:
            z, ids: (P, d) of unit length and (P,), this rank's part of the global batch.
            decay: of the moving averages.
        """
        counts, sums = self._hits(z, ids)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self._move(counts, sums, 1 - decay)
        self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), 1 - decay)

    def used_share(self, at_least: float = 1e-3) -> Tensor:
        """0-d: the share of codes whose running count is `at_least`; at decay 0.99 one hit lasts for 230 steps."""
        return (self.cluster_size >= at_least).float().mean()

    def _hits(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hits of each code, int64 (V,), and the sums of their features in fixed point, int64 (V, d)."""
        counts = torch.zeros(len(self.codes), dtype=torch.int64, device=z.device)
        sums = torch.zeros(self.codes.shape, dtype=torch.int64, device=z.device)
        finite = z.isfinite().all(1)  # a step that overflowed is skipped, its features count for nothing
        fixed = torch.where(finite[:, None], z.double() * _FIXED_POINT, 0.0).round().long()
        return counts.index_add_(0, ids, finite.long()), sums.index_add_(0, ids, fixed)

    def _move(self, counts: Tensor, sums: Tensor, share: float) -> None:
        """Move the codes that were hit by `share` towards the normalised sums, back onto the sphere."""
        mean = F.normalize(sums.double(), dim=1).to(self.codes.dtype)
        moved = F.normalize(self.codes.lerp(mean, share), dim=1)
        self.codes.copy_(torch.where(counts[:, None] > 0, moved, self.codes))


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _gathered(z: Tensor) -> Tensor:
    """The rows of all ranks, in their order."""
    if not dist.is_initialized():
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.contiguous())
    return torch.cat(parts)


class VqkdTokenizer(Tokenizer):
    """Encoder, codes and decoder; pixels enter as 2x - 1. The default sizes are those of the released files.

    Heads have 64 dimensions, as in every released file, whose tensors do not say.

    Args:
        vocab_size: codes V.
        code_dim: d, dimensions of a code.
        teacher_dim: T, dimensions of the teacher's features.
        width: D of encoder and decoder, a multiple of 64.
        depth, decoder_depth: their numbers of blocks.
        grid: patches along a side of the images that it is trained on.
        patch_size: pixels along a side of a patch: the stride of its tokens.
    """

    def __init__(
        self, vocab_size: int = 8192, code_dim: int = 32, teacher_dim: int = 512, width: int = 768, depth: int = 12,
        decoder_depth: int = 3, grid: int = 14, patch_size: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % _HEAD_DIM:
            raise ValueError(f"width {width} is not a multiple of {_HEAD_DIM}, the dimensions of a head")
        self.vocab_size, self.stride = vocab_size, patch_size
        self.width = 16 * width // patch_size**2 + 1  # a block's widest activations per pixel
        plain = BeitConfig(
            width=width, num_heads=width // _HEAD_DIM, use_abs_pos_emb=True, relative_position_bias="none",
            layer_scale_init=None, num_classes=0, depth=depth, image_size=grid * patch_size, patch_size=patch_size,
        )  # fmt: skip
        self.encoder = Beit(plain)
        on_codes = {"in_chans": code_dim, "patch_size": 1, "image_size": grid, "depth": decoder_depth}
        self.decoder = Beit(plain.for_classification(0, **on_codes))
        self.quantize = CosineQuantizer(vocab_size, code_dim)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.decode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, teacher_dim))
        for layer in (*self.encode_task_layer, *self.decode_task_layer):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-2.0, b=2.0)
                nn.init.zeros_(layer.bias)
        self.recent: list[tuple[Tensor, Tensor]] = []  # (latents, ids) of the micro-batches since the last step

    def to_precision(self, dtype: torch.dtype) -> Self:
        """Run the Transformers in `dtype`; the layers that make a code stay float32."""
        self.encoder.to(dtype)
        self.decoder.to(dtype)
        return self

    def prepare(self) -> Self:
        """Return the tokenizer as it is: its blocks are on fast kernels, its codes are compared in float32."""
        return self

    def _dtype(self) -> torch.dtype:
        return self.encoder.cls_token.dtype

    def no_weight_decay(self) -> set[str]:
        """Names that the official optimizer exempts from weight decay, beside vectors."""
        return {f"{part}.{name}" for part in ("encoder", "decoder") for name in ("cls_token", "pos_embed")}

    def latents(self, images: Tensor) -> Tensor:
        """Give the unit vectors, float32 (B, N, d), that are compared with the codes, for images in [0, 1]."""
        tokens = self.encoder.forward_features((images.to(self._dtype()) * 2).sub_(1))[:, 1:]
        tokens = self.encoder.fc_norm(tokens)
        with _without_autocast(images):
            return F.normalize(self.encode_task_layer(tokens.float()), dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Give the latents as (B, d, h, w)."""
        h, w = images.shape[2] // self.stride, images.shape[3] // self.stride
        return self.latents(images).transpose(1, 2).unflatten(2, (h, w))

    def head(self) -> tuple[Tensor, Tensor]:
        """Give the codes (V, d), and zeros."""
        return self.quantize.head()

    def _ids(self, rows: Tensor) -> Tensor:
        return self.quantize.nearest(rows)

    def predict(self, codes: Tensor) -> Tensor:
        """Give the decoder's features (B, h * w, T) for vectors (B, d, h, w)."""
        tokens = self.decoder.forward_features(codes.to(self.decoder.cls_token.dtype))[:, 1:]
        return self.decode_task_layer(self.decoder.fc_norm(tokens).to(self.decode_task_layer[0].weight.dtype))

    def forward(self, images: Tensor, teacher_features: Tensor, quantize: bool) -> tuple[Tensor, Tensor]:
        """Give the two losses of each image; while training, latents and ids are kept for `take_recent`.

        Args:
            images: (B, 3, H, W) in [0, 1].
            teacher_features: (B, N, T), one for each patch.
            quantize: without it the latents go to the decoder as they are, and the second loss is 0.

        Returns:
            1 - cosine of the predicted features and the teacher's, (B,), the mean over patches; and the mean squared
            error of the latents to their codes, (B,).
        """
        z = self.latents(images)  # (B, N, d)
        h, w = images.shape[2] // self.stride, images.shape[3] // self.stride
        rows = z.detach().flatten(0, 1)
        ids = rows.new_zeros(len(rows), dtype=torch.int64)
        commitment = z.new_zeros(len(z))
        if quantize:
            with _without_autocast(images):
                ids = self.quantize.nearest(rows)
            codes = F.embedding(ids, self.quantize.codes).view_as(z)
            commitment = (z - codes).square().mean((1, 2))
            z = z + (codes - z).detach()  # straight through
        if self.training:
            self.recent.append((rows, ids))
        predicted = self.predict(z.transpose(1, 2).unflatten(2, (h, w)))
        cosine = F.cosine_similarity(predicted.float(), teacher_features.float(), dim=-1)
        return 1 - cosine.mean(1), commitment

    def take_recent(self) -> tuple[Tensor, Tensor]:
        """Latents (P, d) and ids (P,) of the step's micro-batches; forgets them."""
        rows, ids = (torch.cat(parts) for parts in zip(*self.recent, strict=True))
        self.recent.clear()
        return rows, ids

    @torch.no_grad()
    def decode_features(self, ids: Tensor) -> Tensor:
        """Give the teacher's features that ids int64 (B, h, w) stand for, (B, h * w, T)."""
        self._check_ids(ids)
        return self.predict(F.embedding(ids, self.quantize.codes).permute(0, 3, 1, 2))

    def decode(self, ids: Tensor) -> Tensor:
        """Refuse: these tokens stand for a teacher's features."""
        raise TokenizerError(
            f"the tokenizer {self.name} has no pixels to show: its tokens stand for a teacher's features "
            "(decode_features); take `dalle` or `demo` for pictures of tokens"
        )
