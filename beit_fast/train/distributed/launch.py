"""`--gpus N`: the same command once per device of this machine, and once more after a crash.

What torchrun does for one node, with the exit codes of a run: it forwards signals and waits for the save; when a
process is killed or crashes, all start again from the newest checkpoint; what ends by itself (a wrong option, a full
disk, a saved run) is not tried again. For several nodes see recipes/slurm/.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Protocol

import torch
import torch.distributed as dist

LAUNCHER = "BEIT_FAST_LAUNCHER_PID"
RESTARTS = 10
GRACE_S = 20.0
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


def is_worker() -> bool:
    """Whether a launcher (this one, torchrun, Slurm's script) started this process."""
    return "RANK" in os.environ


class Worker(Protocol):
    """The part of subprocess.Popen that is used here."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


def start_process(environment: dict[str, str]) -> Worker:
    """This program's own command line, once more."""
    return subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment)


def launch(count: int, device: str, start: Callable[[dict[str, str]], Worker] = start_process) -> int:
    """Run this program in `count` processes; returns the exit code of the run.

    `start` is given the environment of a worker. ValueError where the machine has fewer GPUs.
    """
    if count < 1:
        raise ValueError(f"--gpus is {count}, it must be at least 1")
    if device != "cpu" and torch.cuda.device_count() < count:
        raise ValueError(
            f"--gpus {count}: this machine has {torch.cuda.device_count()} CUDA devices; --device cpu runs without"
        )
    workers: list[Worker] = []
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for attempt in range(RESTARTS + 1):
            # The store of an attempt is its own: an address left over from the one before would be taken for live.
            # It would listen on all interfaces, whatever its address: so it is given a socket of the loopback's.
            with socket.create_server(("127.0.0.1", 0), backlog=2 * count + 16) as listener:
                port = listener.getsockname()[1]
                store = dist.TCPStore(
                    "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
                )
            workers[:] = []
            for rank in range(count):
                workers.append(start(_environment(rank, count, store.port, attempt)))
            codes = _wait(workers)
            del store
            if not any(codes):
                return 0
            crashed = [(rank, -code) for rank, code in enumerate(codes) if code < 0]
            if received or not crashed or attempt == RESTARTS:
                return next((code for code in codes if code > 0), 128 + crashed[0][1] if crashed else 1)
            rank, number = crashed[0]
            print(f"rank {rank} ended by {signal.Signals(number).name}; starting all {count} again", flush=True)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    raise AssertionError("unreachable")


def _environment(rank: int, count: int, port: int, attempt: int) -> dict[str, str]:
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt),
        LAUNCHER: str(os.getpid()),
    }  # fmt: skip
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # one machine: its ranks meet on the loopback
        environment.setdefault(variable, "lo")
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    return environment


def _wait(workers: Sequence[Worker]) -> list[int]:
    """Exit codes; once one has failed the others get `GRACE_S` to end by themselves, and are then killed (code 0)."""
    deadline: float | None = None
    while any(worker.poll() is None for worker in workers):
        if deadline is None and any(worker.poll() for worker in workers):
            crashed = any((worker.poll() or 0) < 0 for worker in workers)
            deadline = time.monotonic() + (2.0 if crashed else GRACE_S)
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [worker.poll() for worker in workers]
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    return [code or 0 for code in codes]
