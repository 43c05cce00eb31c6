"""Memory of the process that measures: how much some code takes, and what the C library does with freed blocks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class PeakMemory:
    """MiB that the code inside took beyond what was there before: of the device, or of this process on a CPU."""

    mib: float | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
        else:
            gc.collect()
            self.before = _reset_resident_peak()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        elif self.before is not None and (peak := _status_mib("VmHWM")) is not None:
            self.mib = max(0.0, peak - self.before)


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks of up to 32 MB, its own limit, and what is free at the end of the heap.

    Otherwise it gives the end back whenever that exceeds twice the largest block freed so far. Whose blocks lie there,
    and are then mapped anew page by page, is chance: of two that ran the same code one came out 1.1 times as
    fast in one process, and the other in the next.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


def _reset_resident_peak() -> float | None:
    """Gives freed memory back, sets the process's peak to what it holds now, and returns that; None off Linux."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's; else what was freed before would come for free
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_mib("VmRSS")


def _status_mib(name: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return None
