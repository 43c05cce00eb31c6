"""Stochastic depth whose decisions depend on the sample, not on the batch it happens to be in."""

from __future__ import annotations

import torch
from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.registration import is_traced

torch.fx.wrap("drop_path_scales")

_FEW_MULTIPLY_ADDS = 1 << 17
"""N * D * D of a sample, below which picking the kept samples costs as much as the others' part of the branch."""

# Constants of the splitmix64 finaliser, as signed 64-bit integers (torch has no unsigned arithmetic).
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def drop_path_scales(rates: Tensor, sample_keys: Tensor | None, batch_size: int) -> Tensor:
    """Factor of every residual branch of every sample: 0 where it is dropped, 1/(1-rate) where it is kept.

    One tensor for all blocks, made on the device without a host sync, so that a step can be captured in a CUDA graph.

    Args:
        rates: (L,) float32, the drop rate of each block (both of its branches share it).
        sample_keys: (B,) int64, a hash of (seed, epoch, sample); the same keys give the same factors whatever the
            batch split or world size. None draws from torch's generator instead.
        batch_size: B.

    Returns:
        (L, 2, B) float32.
    """
    blocks = rates.shape[0]
    if sample_keys is None:
        uniform = torch.rand(blocks, 2, batch_size, device=rates.device)
    else:
        branch = torch.arange(1, 2 * blocks + 1, device=rates.device, dtype=torch.int64).view(blocks, 2, 1)
        mixed = _splitmix64(sample_keys.view(1, 1, -1) + branch * _GOLDEN)
        uniform = _shift_right(mixed, 40).to(torch.float32) * 2.0**-24
    keep = (1.0 - rates).view(blocks, 1, 1)
    return (uniform < keep).to(torch.float32) / keep


def kept_samples(factors: Tensor, x: Tensor) -> Tensor | None:
    """Which samples keep a branch, where it is computed for these alone: on a CPU, outside of traces.

    Elsewhere the host would have to wait for their number, and each number would need a graph of its own.

    Args:
        factors: (B,) of the branch.
        x: (B, N, D), what the branch reads.

    Returns:
        Their indices, int64, or None: the branch is computed for all.
    """
    if is_traced(x) or select("drop_path", x) != "cpu" or x.shape[1] * x.shape[2] ** 2 < _FEW_MULTIPLY_ADDS:
        return None
    kept = factors.nonzero().squeeze(1)
    return kept if len(kept) < len(factors) else None


class DropPathRates(torch.nn.Module):
    """The linear ramp of drop rates over the blocks, `linspace(0, rate, depth)` (spec of Huang et al. as BEiT uses it).

    Args:
        rate: of the last block.
        depth: number of blocks.
        extra, early: number of extra blocks, whose rates are those of layers `early`, `early` + 1, ... of a ramp that
            is as long as it has to be.

    Raises:
        ValueError: rate outside [0, 1).
    """

    def __init__(self, rate: float, depth: int, extra: int = 0, early: int = 0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {rate}")
        self.rate, self.depth, self.extra, self.early = rate, depth, extra, early
        # no buffer, which `to_empty` would leave uninitialised and `bfloat16` round
        self.rates = self._ramps()

    def _ramps(self) -> Tensor:
        ramp = torch.linspace(0.0, self.rate, self.depth, device="cpu")
        if not self.extra:
            return ramp
        end = self.early + self.extra
        return torch.cat((ramp, torch.linspace(0.0, self.rate, max(self.depth, end), device="cpu")[self.early : end]))

    def forward(self, batch_size: int, sample_keys: Tensor | None, device: torch.device) -> Tensor:
        """(L, 2, B) factors of a training step, those of extra blocks last; see `drop_path_scales`."""
        if not isinstance(device, torch.fx.Proxy) and self.rates.device != device:
            with torch.inference_mode(False):
                self.rates = self._ramps().to(device)
        return drop_path_scales(self.rates, sample_keys, batch_size)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
