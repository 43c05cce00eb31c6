"""Visual tokens of a batch: from the store of repeated views (--data.view-cycle), or from the tokenizer."""

import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.pretraining import PretrainBatch
from beit_fast.data.token_store import TokenStore, check_store
from beit_fast.tokenizers import Tokenizer
from beit_fast.tokenizers.base import as_colours


def open_store(
    path: Path, tokenizer: Tokenizer, num_samples: int, num_tokens: int, cycle: int, settings: dict[str, Any],
    dry_run: bool = False,
) -> TokenStore | None:  # fmt: skip
    """The token store at `path`, created where it is missing; with `dry_run` it is only checked.

    Raises:
        ValueError: the tokens do not fit, or the store was made with other `settings`.
        OSError: the disk is too small.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"--data.view-cycle: {tokenizer.vocab_size} visual tokens do not fit into 16 bits")
    shape = {"num_samples": num_samples, "num_tokens": num_tokens, "cycle": cycle}
    if dry_run:
        check_store(path, **shape, settings=settings)
        return None
    store = TokenStore(path, **shape, settings=settings)
    if store.note is not None:
        print(store.note, flush=True)
    return store


class TokenSource:
    """Gives the tokens that a batch is to predict; what the tokenizer computes for a store is kept there.

    A store that cannot be written costs time and no step: what it lacks is computed.
    """

    def __init__(self, tokenizer: Tokenizer, store: TokenStore | None) -> None:
        self.tokenizer, self.store = tokenizer, store
        self._full = False
        self._copies: deque[tuple[torch.cuda.Event, int, NDArray[np.int64], Tensor]] = deque()

    def of(self, batch: PretrainBatch, predict_all: bool = False) -> Tensor:
        """int64: (M,) at the masked positions in row order, or (B, h, w)."""
        if batch.known_tokens is None:
            positions = () if predict_all else (batch.mask, batch.masked_indices)
            return self.tokenizer.encode(as_colours(batch.token_images, self.tokenizer), *positions)
        assert batch.unknown is not None
        tokens = batch.known_tokens
        if len(batch.unknown):
            new = self.tokenizer.encode(
                as_colours(batch.token_images, self.tokenizer)
            )  # at all positions: the next masks are others
            self._keep(batch, new)
            tokens = tokens.index_copy(0, batch.unknown.to(tokens.device, non_blocking=True), new)
        return tokens if predict_all else tokens.flatten()[batch.masked_indices]

    def flush(self) -> None:
        """Write what is still on its way from the device."""
        while self._copies:
            self._write_oldest()

    def _keep(self, batch: PretrainBatch, new: Tensor) -> None:
        assert batch.unknown is not None
        indices = batch.indices[batch.unknown].numpy()
        if new.device.type == "cpu":
            self._write(batch.epoch, indices, new)
            return
        # Copied while the step goes on, written at a later batch. Written without a GPU at hand: unverified.
        host = torch.empty(new.shape, dtype=new.dtype, pin_memory=True)
        host.copy_(new, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._copies.append((copied, batch.epoch, indices, host))
        while self._copies and (len(self._copies) > 8 or self._copies[0][0].query()):
            self._write_oldest()

    def _write_oldest(self) -> None:
        copied, epoch, indices, host = self._copies.popleft()
        copied.synchronize()
        self._write(epoch, indices, host)

    def _write(self, epoch: int, indices: NDArray[np.int64], new: Tensor) -> None:
        assert self.store is not None
        if self._full:
            return
        try:
            self.store.write(epoch, indices, new.flatten(1).numpy())
        except OSError as error:
            self._full = True
            print(f"warning: no more tokens are kept, training goes on ({error})", file=sys.stderr, flush=True)
