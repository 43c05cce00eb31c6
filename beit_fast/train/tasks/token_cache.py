"""Where the visual tokens of a batch come from: the store of repeated views (--data.view-cycle), or the tokenizer."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.pretraining import PretrainBatch, resolve_decoder
from beit_fast.data.sampling import BlockwiseMasking
from beit_fast.data.sources import ImageSource, fingerprint
from beit_fast.data.token_store import TokenStore, check_store
from beit_fast.tokenizers import Tokenizer

if TYPE_CHECKING:
    from beit_fast.train.tasks.pretrain import PretrainConfig


def cache_path(config: PretrainConfig) -> Path | None:
    """The file of the tokens; None where none are kept."""
    data = config.data
    if data.view_cycle is None:
        if data.token_cache not in (None, "off"):
            raise ValueError("--data.token-cache needs --data.view-cycle: only views that repeat have tokens to keep")
        return None
    if data.view_cycle < 1:
        raise ValueError(f"--data.view-cycle is {data.view_cycle}, it must be at least 1")
    if data.token_cache == "off":
        return None
    return Path(data.token_cache).expanduser() if data.token_cache is not None else config.output_dir / "tokens.cache"


def open_store(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    source: ImageSource,
    masking: BlockwiseMasking,
    device: torch.device,
) -> TokenStore | None:
    """The run's token store, created where it is missing; None where nothing is kept, and for --dry-run.

    ValueError where a store made with other settings is found, OSError where the disk is too small.
    """
    path = cache_path(config)
    if path is None:
        return None
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"--data.view-cycle: {tokenizer.vocab_size} visual tokens do not fit into 16 bits")
    cycle = config.data.view_cycle
    assert cycle is not None
    shape = {"num_samples": len(source), "num_tokens": masking.grid[0] * masking.grid[1], "cycle": cycle}
    settings = settings_of(config, tokenizer, source, masking) | {
        "decoder": resolve_decoder(config.data.decoder, device)
    }
    if config.dry_run:
        check_store(path, **shape, settings=settings)
        return None
    store = TokenStore(path, **shape, settings=settings)
    if store.note is not None:
        print(store.note, flush=True)
    return store


def settings_of(
    config: PretrainConfig, tokenizer: Tokenizer, source: ImageSource, masking: BlockwiseMasking
) -> dict[str, Any]:
    """All that the tokens of sample i in epoch e of the cycle depend on, but for what depends on the device."""
    data = config.data
    return {
        "data": fingerprint(source),
        "builtin_size": data.builtin_size if data.path is None else None,
        "seed": config.seed,
        "scale": data.scale,
        "ratio": data.ratio,
        "flip_probability": data.flip_probability,
        "jitter": data.jitter,
        "image_size": config.model.image_size,  # contrast is about the mean gray of the model's view
        "token_image_size": masking.grid[0] * tokenizer.stride,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
    }


class TokenSource:
    """Tokens of batches where they are to be predicted; what the tokenizer computes for a store is kept there."""

    def __init__(self, tokenizer: Tokenizer, store: TokenStore | None) -> None:
        self.tokenizer, self.store = tokenizer, store
        self._copies: deque[tuple[torch.cuda.Event, int, NDArray[np.int64], Tensor]] = deque()

    def of(self, batch: PretrainBatch, predict_all: bool = False) -> Tensor:
        """int64: (M,) at the masked positions in row order, or (B, h, w)."""
        if batch.known_tokens is None:
            where = () if predict_all else (batch.mask, batch.masked_indices)
            return self.tokenizer.encode(batch.token_images, *where)
        assert batch.unknown is not None
        tokens = batch.known_tokens
        if len(batch.unknown):
            made = self.tokenizer.encode(batch.token_images)  # at all positions: the next masks are others
            self._keep(batch, made)
            tokens = tokens.index_copy(0, batch.unknown.to(tokens.device, non_blocking=True), made)
        return tokens if predict_all else tokens.flatten()[batch.masked_indices]

    def flush(self) -> None:
        """Write what is still on its way from the device."""
        while self._copies:
            self._write_oldest()

    def _keep(self, batch: PretrainBatch, made: Tensor) -> None:
        assert batch.unknown is not None
        indices = batch.indices[batch.unknown].numpy()
        if made.device.type == "cpu":
            self._write(batch.epoch, indices, made)
            return
        # Copied while the step goes on, written at a later batch. Written without a GPU at hand: unverified.
        host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        host.copy_(made, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._copies.append((copied, batch.epoch, indices, host))
        while self._copies and (len(self._copies) > 8 or self._copies[0][0].query()):
            self._write_oldest()

    def _write_oldest(self) -> None:
        copied, epoch, indices, host = self._copies.popleft()
        copied.synchronize()
        self._write(epoch, indices, host)

    def _write(self, epoch: int, indices: NDArray[np.int64], made: Tensor) -> None:
        assert self.store is not None
        self.store.write(epoch, indices, made.flatten(1).numpy())
