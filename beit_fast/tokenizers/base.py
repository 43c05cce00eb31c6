"""What every tokenizer offers: images in [0, 1] to visual tokens and back."""

import copy
import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.kernels.backend import select
from beit_fast.kernels.conv import ExactHead, exact_argmax

__all__ = ["Tokenizer", "TokenizerError"]

# A vocabulary of 8192 makes logits the largest tensor by far; they never exist for more rows than this many bytes hold.
# On a CPU the buffer then stays in the cache and is never handed back to the operating system between batches.
_LOGIT_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
_ACTIVATION_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_WORTH_COMPILING = 128  # channels; below, compiling takes longer than it saves in a run of some hours


class TokenizerError(ValueError):
    """A tokenizer cannot be read, verified or used; the message is one line that names the way out."""


class Tokenizer(nn.Module):
    """Base class: a subclass gives `features`, `head` and `decode`; `encode` is the same for all.

    Attributes:
        vocab_size: number of visual tokens V.
        stride: pixels per token along one side.
        width: channels of the widest activation.
        channels: of the images.
        name, sha256: where the weights came from; the hash is "" when untrained.
    """

    vocab_size: int
    stride: int
    width: int
    channels: int = 3
    name: str = "untrained"
    sha256: str = ""
    _exact_head: ExactHead | None = None
    _fused: Callable[[Tensor], Tensor] | None = None
    _compiled: Callable[[Tensor], Tensor] | None = None

    def features(self, images: Tensor) -> Tensor:
        """Give the input (B, C, h, w) of the 1x1 output convolution for images (B, channels, H, W) in [0, 1]."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, Tensor]:
        """Give weight (V, C) and bias (V,) of the 1x1 output convolution."""
        raise NotImplementedError

    def to_precision(self, dtype: torch.dtype) -> Self:
        """Run the network in `dtype`, all but what decides between tokens, which stays float32."""
        raise NotImplementedError

    def prepare(self) -> Self:
        """Prepare fast inference with the weights, the precision and the device as they are; their change undoes it.

        On a GPU with Triton half-precision rows go through `exact_argmax`; wide features are compiled.
        """
        weight, bias = self.head()
        if self._dtype() != torch.float32 and select("exact_argmax", weight) == "triton":
            self._exact_head = ExactHead.of(weight, bias, self._dtype())
        if weight.is_cuda and self.width >= _WORTH_COMPILING:
            self._compiled = torch.compile(self.features)
        return self

    def _dtype(self) -> torch.dtype:
        """Precision of the convolutions but the output one."""
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the module, as `to` and its kin do."""
        self._exact_head = self._fused = self._compiled = None
        return super()._apply(*args, **kwargs)

    def _fast_features(self, images: Tensor) -> Tensor:
        """As `features`, by fused passes or compiled where that was prepared and works here."""
        if self._fused is not None:
            return self._fused(images)
        if self._compiled is not None:
            try:
                return self._compiled(images)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a missing or broken compiler raises: uncompiled it works as well
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                print(f"tokenizer {self.name} runs uncompiled: {reason}", file=sys.stderr)
                self._compiled = None
        return self.features(images)

    def decode(self, ids: Tensor) -> Tensor:
        """Give images (B, channels, H, W) in [0, 1] for ids int64 (B, h, w)."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, images: Tensor, mask: Tensor | None = None, masked_indices: Tensor | None = None) -> Tensor:
        """Give the visual tokens of images: the arg-max over the vocabulary at each position.

        Args:
            images: floating (B, channels, H, W) in [0, 1]; H and W are multiples of `stride`.
            mask: bool (B, h, w) or (B, h*w): the output convolution runs at its True positions only.
            masked_indices: int64 (M,), `mask.flatten().nonzero()` known beforehand; saves a host sync on a GPU.

        Returns:
            int64 (B, h, w), or (M,) in row-major order where a mask is given: view it as (B, M) when all rows have the
            same count.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        h, w = self._check_images(images)
        batch = images.shape[0]
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape not in ((batch, h, w), (batch, h * w)):
                raise ValueError(
                    f"mask must be bool of shape {(batch, h, w)} or {(batch, h * w)}, not {mask.dtype} "
                    f"{tuple(mask.shape)}: one entry per token of images {tuple(images.shape)}"
                )
            if masked_indices is None:
                masked_indices = mask.reshape(-1).nonzero().squeeze(1)
        if not batch:
            return images.new_empty((0, h, w) if masked_indices is None else 0, dtype=torch.int64)
        bytes_per_image = self.width * images.shape[2] * images.shape[3] * self.head()[0].element_size()
        step = max(1, _ACTIVATION_BYTES.get(images.device.type, 1 << 30) // bytes_per_image)
        parts = []
        for part in images.split(step):
            rows = self._fast_features(part).permute(0, 2, 3, 1).flatten(0, 2)  # (b, h, w, C) -> (b*h*w, C)
            parts.append(self._ids(rows) if masked_indices is None else rows)
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        if masked_indices is None:
            return flat.view(batch, h, w)
        # only a host sync could tell how many masked rows a part holds: they are taken from all parts together
        return self._ids(flat.index_select(0, masked_indices.to(flat.device, non_blocking=True)))

    def _ids(self, rows: Tensor) -> Tensor:
        """Give the tokens, int64 (P,), of rows (P, C) of `features`."""
        if self._exact_head is not None and rows.dtype == self._exact_head.half.dtype:
            return exact_argmax(rows, self._exact_head, _logit_bytes(rows))
        return argmax_rows(rows, *self.head())

    def multiply_adds(self, height: int, width: int, positions: int | None = None) -> int:
        """Count the multiply-adds of encoding one image, the output convolution at `positions` (all where None)."""
        meta = copy.deepcopy(self).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features = meta.features(torch.empty(1, self.channels, height, width, device="meta"))
        positions = features[0, 0].numel() if positions is None else positions
        return counter.get_total_flops() // 2 + positions * meta.head()[0].numel()

    def _check_images(self, images: Tensor) -> tuple[int, int]:
        shaped = images.ndim == 4 and images.shape[1] == self.channels and images.is_floating_point()
        if not shaped or any(side == 0 or side % self.stride for side in images.shape[2:]):
            raise ValueError(
                f"images must be floating point (B, {self.channels}, H, W) in [0, 1] with H and W multiples of "
                f"{self.stride}, not {images.dtype} {tuple(images.shape)}"
            )
        return images.shape[2] // self.stride, images.shape[3] // self.stride

    def _check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 3 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 (B, h, w), not {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(f"ids must lie in [0, {self.vocab_size}), not [{int(ids.min())}, {int(ids.max())}]")


def as_colours(images: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Give images (B, C, H, W) of one channel as grey ones to a tokenizer of colours; others as they are."""
    return images.expand(-1, tokenizer.channels, -1, -1) if images.shape[1] == 1 < tokenizer.channels else images


def _logit_bytes(rows: Tensor) -> int:
    return _LOGIT_BYTES.get(rows.device.type, 128 << 20)


def argmax_rows(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """argmax(rows @ weight.T + bias) for rows (P, C), weight (V, C): int64 (P,), through one reused buffer.

    Of equal ones the lowest index.
    """
    rows, logit_bytes = rows.to(weight.dtype), _logit_bytes(rows)
    count, vocab = rows.shape[0], weight.shape[0]
    chunk = min(max(1, count), max(1, logit_bytes // (vocab * weight.element_size())))
    buffer = torch.empty(chunk, vocab, dtype=weight.dtype, device=rows.device)
    ids = torch.empty(count, dtype=torch.int64, device=rows.device)
    transposed = weight.t()
    for start in range(0, count, chunk):
        part = rows[start : start + chunk]
        logits = buffer[: part.shape[0]]
        torch.addmm(bias, part, transposed, out=logits)
        torch.argmax(logits, dim=1, out=ids[start : start + chunk])
    return ids
