"""What every tokenizer offers: images in [0, 1] to visual tokens and back."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Tokenizer", "TokenizerError"]

# A vocabulary of 8192 makes logits the largest tensor by far; they never exist for more rows than this many bytes hold.
# On a CPU the buffer then stays in the cache and is never handed back to the operating system between batches.
_LOGIT_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
_ACTIVATION_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class TokenizerError(ValueError):
    """A tokenizer cannot be read, verified or used; the message is one line that names the way out."""


class Tokenizer(nn.Module):
    """Base class. A subclass gives `features`, `head` and `decode`; `encode` is the same for all.

    Attributes: `vocab_size`; `stride`, pixels per token along one side; `width`, channels of the widest activation;
    `name` and `sha256`, where the weights came from ("" when untrained).
    """

    vocab_size: int
    stride: int
    width: int
    name: str = "untrained"
    sha256: str = ""

    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B, C, h, w), the input of the 1x1 output convolution."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (V, C) and bias (V,) of the 1x1 output convolution."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor:
        """ids int64 (B, h, w) -> images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, images: Tensor, mask: Tensor | None = None, masked_indices: Tensor | None = None) -> Tensor:
        """Visual tokens: the arg-max over the vocabulary at each position, without a softmax.

        images: floating (B, 3, H, W) in [0, 1]; H and W are multiples of `stride`.
        mask: bool (B, h, w) or (B, h*w). Where it is given, the output convolution runs at its True positions only.
        masked_indices: int64 (M,), `mask.flatten().nonzero()` known beforehand; it saves a host sync on a GPU.
        Returns int64 (B, h, w), or (M,) in row-major order where a mask is given (view it as (B, M) when all rows have
        the same count). Raises ValueError for wrong shapes or dtypes.
        """
        h, w = self._check_images(images)
        batch = images.shape[0]
        weight, _ = self.head()
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape not in ((batch, h, w), (batch, h * w)):
                raise ValueError(
                    f"mask must be bool of shape {(batch, h, w)} or {(batch, h * w)}, not {mask.dtype} "
                    f"{tuple(mask.shape)}: one entry per token of images {tuple(images.shape)}"
                )
            if masked_indices is None:
                masked_indices = mask.reshape(-1).nonzero().squeeze(1)
        kind = images.device.type
        bytes_per_image = self.width * images.shape[2] * images.shape[3] * weight.element_size()
        step = max(1, _ACTIVATION_BYTES.get(kind, 1 << 30) // bytes_per_image)
        parts = []
        for start in range(0, batch, step):
            rows = self.features(images[start : start + step]).permute(0, 2, 3, 1)  # (b, h, w, C)
            rows = rows.reshape(-1, rows.shape[-1])
            parts.append(rows if masked_indices is not None else self._ids(rows))
        if not parts:
            return images.new_empty(0 if masked_indices is not None else (0, h, w), dtype=torch.int64)
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        if masked_indices is None:
            return flat.view(batch, h, w)
        # How many rows a part holds only a host sync would tell: they are taken from all parts together.
        return self._ids(flat.index_select(0, masked_indices.to(flat.device, non_blocking=True)))

    def _ids(self, rows: Tensor) -> Tensor:
        """Rows (P, C) of `features` -> int64 (P,)."""
        return _argmax_rows(rows, *self.head(), _LOGIT_BYTES.get(rows.device.type, 128 << 20))

    def multiply_adds(self, height: int, width: int, positions: int | None = None) -> int:
        """Multiply-adds of encoding one image with the output convolution at `positions` (all where None)."""
        meta = copy.deepcopy(self).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features = meta.features(torch.empty(1, 3, height, width, device="meta"))
        weight, _ = meta.head()
        positions_of_grid = features.shape[2] * features.shape[3]
        return counter.get_total_flops() // 2 + weight.numel() * (positions_of_grid if positions is None else positions)

    def _check_images(self, images: Tensor) -> tuple[int, int]:
        s = self.stride
        shaped = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
        if not shaped or images.shape[2] % s or images.shape[3] % s or not images.shape[2] or not images.shape[3]:
            raise ValueError(
                f"images must be floating point (B, 3, H, W) in [0, 1] with H and W multiples of {s}, "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        return images.shape[2] // s, images.shape[3] // s

    def _check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 3 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 (B, h, w), not {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(f"ids must lie in [0, {self.vocab_size}), not [{int(ids.min())}, {int(ids.max())}]")


def _argmax_rows(rows: Tensor, weight: Tensor, bias: Tensor, logit_bytes: int) -> Tensor:
    """argmax(rows @ weight.T + bias) for rows (P, C), weight (V, C): int64 (P,), through one reused buffer."""
    rows = rows.to(weight.dtype)
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
