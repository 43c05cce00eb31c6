"""`linear_argmax` in plain torch: logits of a piece of the rows at a time, in one buffer."""

import torch
from torch import Tensor

LOGIT_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""Logits that exist at a time: on a CPU they stay in the cache, and are not handed back to the operating system."""


def logit_bytes(rows: Tensor) -> int:
    return LOGIT_BYTES.get(rows.device.type, 128 << 20)


def linear_argmax(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows (P, C), weight (V, C), bias (V,), all of one dtype -> int64 (P,)."""
    P, V = rows.shape[0], weight.shape[0]
    piece = min(max(1, P), max(1, logit_bytes(rows) // (V * weight.element_size())))
    buffer = weight.new_empty(piece, V)
    ids = torch.empty(P, dtype=torch.int64, device=rows.device)
    transposed = weight.t()
    for start in range(0, P, piece):
        part = rows[start : start + piece]
        logits = buffer[: part.shape[0]]
        torch.addmm(bias, part, transposed, out=logits)
        torch.argmax(logits, dim=1, out=ids[start : start + piece])
    return ids
