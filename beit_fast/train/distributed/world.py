"""Processes and devices: torchrun's environment, the process groups, and the stop signal that all ranks agree on."""

import contextlib
import ctypes
import enum
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from beit_fast.train.config import RunConfig

TIMEOUT = timedelta(minutes=10)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
ECHO_S = 1.0


class OtherRankFailed(RuntimeError):
    """Work that all ranks share failed on another one."""


@dataclass
class World:
    """The rank of this process among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device
    shares_failures: bool = field(default=False, init=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place; without waiting for the device where there is one process or NCCL."""
        if self.size > 1:
            if self.shares_failures:
                self._exchange(failed=False)
            dist.all_reduce(value)
        return value

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside, what fails on one rank fails on all: before each sum, and at the end, they say who has failed.

        Raises:
            OtherRankFailed: on the ranks that have not failed themselves.
        """
        self.shares_failures = self.size > 1
        try:
            yield
            if self.shares_failures:
                self._exchange(failed=False)
        except OtherRankFailed:
            raise
        except Exception:
            if self.shares_failures:
                with contextlib.suppress(OtherRankFailed):
                    self._exchange(failed=True)
            raise
        finally:
            self.shares_failures = False

    def _exchange(self, failed: bool) -> None:
        if self.any(failed):
            raise OtherRankFailed("it failed on another rank, which says why")

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank; waits for all ranks."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.broadcast(value, 0)
        return int(value.item())

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order; waits for all of them."""
        if self.size == 1:
            return [text]
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(own)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = int(torch.cat(lengths).max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(own)] = own
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [bytes(p[: int(n)].tolist()).decode() for p, n in zip(parts, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; waits for all ranks."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device cuda: torch sees no CUDA device here; use --device cpu")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device cuda:{index}: this machine has {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", index)
    return device


def start_world(device: str) -> World:
    """Join the processes torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or stand alone.

    A worker dies with its launcher: an orphan would hold its device and its port.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        alone = resolve_device(device)
        if alone.type == "cuda":
            torch.cuda.set_device(alone)
        return World(0, 1, alone)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != int(os.environ.get("BEIT_FAST_LAUNCHER_PID", os.getppid())):
            os._exit(1)  # the launcher was gone before it could be watched
    own = resolve_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        backend = "nccl" if own.type == "cuda" else "gloo"
        if backend == "nccl":  # where a collective hangs, what every rank was doing is dumped
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        try:
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=own if own.type == "cuda" else None)
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            reason = str(error).strip().splitlines()[0][:200]
            raise OSError(
                f"rank {rank} cannot meet the others at {place} ({reason}); is the port in use? Choose another "
                "MASTER_PORT (torchrun --master-port), and start all ranks with the same"
            ) from error
    return World(rank, size, own)


def end_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def check_world(config: RunConfig, world: World) -> None:
    """What can be said once the number of processes is known."""
    if config.batch_size % world.size:
        raise ValueError(f"--batch-size {config.batch_size} is not divisible by the {world.size} processes")


class LostRank(RuntimeError):
    """Another process of the run is gone, or did not answer."""


def lost_rank(error: Exception, rank: int, step: int) -> LostRank | None:
    """What an error means that says that another process ended or does not answer; gloo raises bare RuntimeErrors."""
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    signs = ("closed by peer", "connection reset", "gloo/transport", "timed out waiting")
    if not isinstance(error, dist.DistError) and not any(sign in text for sign in signs):
        return None
    return LostRank(f"rank {rank} lost another one at step {step} ({str(error).splitlines()[0][:200]})")


class Vote(enum.IntEnum):
    """What the ranks agree on between two steps; the highest vote counts."""

    CONTINUE = 0
    STOP = 1
    """Save and end: a signal came."""
    FAILED = 2
    """End: a rank could not write its checkpoint."""


class Interrupted(BaseException):
    """A stop signal came during work that can be broken off: nothing of it is needed to continue the run."""


class StopSignal:
    """SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C asks all ranks to stop at the same step; a second signal ends the process.

    A launcher and a scheduler often send the same signal, so what comes within `ECHO_S` seconds is one signal. Ranks
    agree through a CPU process group of its own: what is sent at one step is read at the next, so nothing waits for a
    device.
    """

    def __init__(self, world: World) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._interruptible = False
        self._world = world
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
            if self._interruptible:
                raise Interrupted
        elif time.monotonic() - self._received_at > ECHO_S:
            os._exit(128 + number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` inside when a signal comes, or has come; outside a signal waits for the next poll."""
        self._interruptible = True
        try:
            if self.received is not None:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def poll(self, failed: bool = False) -> Vote:
        """Whether to stop after this step; the same answer on every rank. Call once per step."""
        own = Vote.FAILED if failed else Vote.STOP if self.received is not None else Vote.CONTINUE
        if self._group is None:
            return own
        vote = Vote.CONTINUE
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            vote = Vote(int(flag.item()))
        flag = torch.tensor(int(own))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (flag, work)
        return vote

    def drain(self) -> None:
        """Wait for the last exchange; every rank calls it after its last `poll`."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None

    def close(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
