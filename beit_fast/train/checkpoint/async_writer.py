"""Checkpoints written while the training goes on: a copy on the host at the end of the step, files by a thread.

The copy is ordered after the step on the device's own queue, so the host goes on at once. A failure is kept in
`failure`, for the ranks to agree on. One save at a time: the next one waits for it.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit_fast.train.checkpoint import format as checkpoint
from beit_fast.train.checkpoint import resharding
from beit_fast.train.checkpoint.format import mib, tensor_bytes
from beit_fast.train.distributed.world import TIMEOUT, World
from beit_fast.train.progress import duration

RESERVED = 16
"""Descriptors kept for a save: it is written also by a process that has none left."""
Part = tuple[Mapping[str, Tensor], Mapping[str, Sequence[int]]]


class CheckpointWriter:
    """Writes the checkpoints of a run under `root`; every rank has one and calls it at the same steps.

    Args:
        background: write in a thread, from a copy on the host (of the state's size, pinned where there is a GPU).
        sharded: every rank writes its part (FSDP2); otherwise rank 0 writes all.
        log: receives one line per checkpoint written, from the thread that wrote it.
    """

    def __init__(
        self, root: Path, keep: int, world: World, background: bool, sharded: bool, log: Callable[[str], None]
    ) -> None:
        self.root, self.keep, self.world, self.sharded, self.log = root, keep, world, sharded, log
        self.background = background
        # A group of its own: the thread of one rank waits for those of the others while the steps go on.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if sharded and world.size > 1 else None
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self._reserved: list[int] = []
        self._reserve()

    def _reserve(self) -> None:
        with contextlib.suppress(OSError):
            while len(self._reserved) < RESERVED:
                self._reserved.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _release(self) -> None:
        while self._reserved:
            os.close(self._reserved.pop())

    __del__ = _release

    def save(self, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Save `files` and `state` as the checkpoint of `step`; without `background` it is written on return."""
        began = time.perf_counter()
        self.join()
        if not self.sharded and not self.world.is_main:
            return
        parts = {name: resharding.own_parts(tensors, self.world.rank) for name, tensors in files.items()}
        size = sum(tensor_bytes(tensors) for tensors in files.values())
        if not self.background:
            try:
                self._write(step, parts, state, size, began, None)
            except OSError as error:
                self.failure = error
            return
        copies = {name: (self._copied(name, tensors), offsets) for name, (tensors, offsets) in parts.items()}
        ready = None
        if self.world.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.world.device))
        held = time.perf_counter() - began

        def write() -> None:
            try:
                if ready is not None:
                    ready.synchronize()
                self._write(step, copies, state, size, began, held)
            except BaseException as error:  # the training thread raises it
                self.failure = error

        self._thread = threading.Thread(target=write, name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def _copied(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get((file, name))
            if buffer is None or buffer.shape != tensor.shape:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
                self._buffers[file, name] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(
        self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any], size: int, began: float,
        held: float | None,
    ) -> None:  # fmt: skip
        self._release()
        try:
            path = self._write_files(step, parts, state)
        finally:
            self._reserve()
        waited = "" if held is None else f", training waited {duration(held)}"
        self.log(f"saved {path.name} ({mib(size)} in {duration(time.perf_counter() - began)}{waited})")

    def _write_files(self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any]) -> Path:
        if self.sharded:
            return resharding.save_sharded(
                self.root, step, parts, state, self.keep, self.world.rank, self.world.size, self._barrier
            )
        tensors = {name: part for name, (part, _) in parts.items()}
        return checkpoint.save_checkpoint(self.root, step, tensors, state, self.keep)

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def join(self) -> None:
        """Wait for the save in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
