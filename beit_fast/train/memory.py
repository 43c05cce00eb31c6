"""Memory of a training by part, and what to change where it does not suffice."""

import os
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.train.checkpoint.format import tensor_bytes
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.metrics import peak_memory_mib

USABLE = 0.94
"""Share of a device's memory that a training can count on: the rest is the driver's and lost to fragmentation."""


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice; the message computes what to change."""


@dataclass(frozen=True)
class StateMemory:
    """Bytes that a training holds between two steps, over all ranks that share them."""

    weights: int = 0
    gradients: int = 0
    moments: int = 0
    averages: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.averages

    @property
    def saved(self) -> int:
        """Bytes of a checkpoint."""
        return self.total - self.gradients


def state_memory(model: nn.Module, groups: list[dict[str, Any]], average: Mapping[str, Tensor] | None) -> StateMemory:
    """What training `model` with AdamW's two fp32 moments holds."""
    trained = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
    moments = 8 * sum(p.numel() for p in trained.values())
    return StateMemory(tensor_bytes(model.state_dict()), tensor_bytes(trained), moments, tensor_bytes(average or {}))


def largest_micro_batch(capacity: float, state: float, per_sample: float) -> int:
    """Samples per device that fit beside the state; a multiple of 8 from 16 on, as matrix units like it. 0: none."""
    count = int((USABLE * capacity - state) // per_sample) if per_sample > 0 else 0
    return max(count - count % 8 if count >= 16 else count, 0)


def capacity_bytes(device: torch.device) -> int:
    """Memory that this process can have: of its GPU what is free or its own, else of the host what limits leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return total if limit == resource.RLIM_INFINITY else min(limit, total)


def peak_bytes(device: torch.device) -> float:
    """The most that was in use so far, in the terms of `capacity_bytes`: under a limit, the address space."""
    if device.type == "cpu" and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        status = Path("/proc/self/status").read_text()
        if match := re.search(r"VmPeak:\s*(\d+) kB", status):
            return 1024.0 * int(match[1])
    return 2**20 * peak_memory_mib(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch raises a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def requested_bytes(error: BaseException) -> float:
    """What could not be had, from the error's text."""
    text = str(error)
    if match := re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", text):
        return float(match[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[match[2]]
    return 0.0


def out_of_memory(
    error: BaseException, config: RunConfig, world: World, micro_batch: int, state: StateMemory
) -> OutOfMemory:
    """The error in one line, with the micro-batch that fits by what this one took."""
    peak, requested = peak_bytes(world.device), requested_bytes(error)
    capacity = capacity_bytes(world.device)
    held = state.total / (world.size if config.parallel == "fsdp2" else 1)
    per_sample = max(peak + requested - held, requested) / micro_batch
    fits = min(largest_micro_batch(capacity, held, per_sample), micro_batch - 1)
    advice = []
    if fits >= 1:
        local = config.batch_size // world.size
        advice.append(f"--batch-per-device {fits} ({-(-local // fits)} micro-batches per step, same results)")
    if getattr(getattr(config, "model", None), "grad_checkpointing", None) is False:
        advice.append("--model.grad-checkpointing (activations are recomputed, about a third more time)")
    if config.parallel == "ddp" and held > 0.3 * capacity:
        advice.append("--parallel fsdp2 on several GPUs")
    gib = 2.0**30
    return OutOfMemory(
        f"out of memory with {micro_batch} samples at once: {peak / gib:.2f} GiB were in use at most and "
        f"{requested / gib:.2f} GiB more were asked for, of {capacity / gib:.2f} GiB; weights, gradients and optimizer "
        f"hold {held / gib:.2f} GiB, a sample takes at least {per_sample / gib:.3f} GiB; try "
        f"{', or '.join(advice) or 'a smaller model'}"
    )
