"""Clocks, the machine's own ceilings, and recorded times handed to pytest-benchmark."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch


class Timed(Protocol):
    """What a clock times: `run`, after `prepare` outside the clock."""

    run: Callable[[], Any]
    prepare: Callable[[], None] | None


class Clock:
    """Seconds per call, waiting for the device before the first and after the last.

    On a GPU several calls are timed call by call with events, the L2 cache overwritten in between.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def time(self, one: Timed, calls: int) -> float:
        enabled = gc.isenabled()
        gc.disable()
        try:
            if calls > 1 and self.flush is not None:
                return self._by_events(one, calls)
            return self._by_wall_clock(one, calls)
        finally:
            if enabled:
                gc.enable()

    def _by_wall_clock(self, one: Timed, calls: int) -> float:
        run, prepare, elapsed = one.run, one.prepare, 0.0
        if prepare is None:
            if calls > 1:
                run()  # not timed: caches and allocator are as another implementation left them
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            self.wait()
            return (time.perf_counter() - start) / calls
        for _ in range(calls):
            prepare()
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            elapsed += time.perf_counter() - start
        return elapsed / calls

    def _by_events(self, one: Timed, calls: int) -> float:
        assert self.flush is not None
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        self.wait()
        for start, end in events:
            if one.prepare is not None:
                one.prepare()
            self.flush.zero_()
            start.record()
            one.run()
            end.record()
        self.wait()
        return median(start.elapsed_time(end) for start, end in events) / 1e3

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def cpu_seconds() -> float:
    """CPU time of this process and of its child processes, those that still work (on Linux) and those that ended."""
    ended, ticks = os.times(), 0
    for listed in Path("/proc/self/task").glob("*/children"):
        for child in listed.read_text().split():
            with contextlib.suppress(OSError):  # it has just ended
                after_name = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, after_name[11:15]))  # user and system, its own and of its children
    return time.process_time() + ended.children_user + ended.children_system + ticks / os.sysconf("SC_CLK_TCK")


class CpuClock:
    """Seconds of CPU time per call, child processes too: from when nothing works ahead to when nothing does again."""

    def time(self, one: Timed, calls: int) -> float:
        elapsed = 0.0
        for _ in range(calls):
            if one.prepare is not None:
                one.prepare()
            self.settle()
            start = cpu_seconds()
            one.run()
            self.settle()
            elapsed += cpu_seconds() - start
        return elapsed / calls

    @staticmethod
    def settle() -> None:
        while True:
            before = cpu_seconds()
            time.sleep(0.05)
            if cpu_seconds() - before < 0.002:
                return


def count_launches(run: Callable[[], Any]) -> int:
    """Kernels of one call on the GPU, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return kernels_among(profile.events())


def kernels_among(events: Iterable[Any]) -> int:
    """How many of a profile's events are kernels: not copies, fills or ranges that someone named."""
    on_gpu = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.is_user_annotation and not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


class Probe(NamedTuple):
    """Work whose rate is a ceiling of the machine."""

    run: Callable[[], Any]
    work: float


_probes: dict[tuple[str, str], dict[str, Probe]] = {}


def ceilings(device: torch.device, dtype: str) -> dict[str, Probe]:
    """A matrix product of that dtype on random data, and a copy several times the size of any cache."""
    key = (str(device), dtype)
    if key not in _probes:
        side, size = (8192, 2 << 30) if device.type == "cuda" else (1280, 96 << 20)
        kind = getattr(torch, dtype)
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        product = torch.empty_like(a)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        _probes[key] = {
            "matmul": Probe(lambda: torch.mm(a, b, out=product), 2.0 * side**3),
            "copy": Probe(lambda: target.copy_(source), 2.0 * size),
        }
        for probe in _probes[key].values():
            probe.run()
    return _probes[key]


class RecordedClock:
    """Hands recorded times to pytest-benchmark, which only knows to measure by itself.

    It is given to it as its timer, `next_round` as the function to time: a round "takes" what was measured before.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds: list[float] = []

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: list[float]) -> int:
        self.rounds = list(reversed(seconds))
        return len(seconds)

    def next_round(self) -> None:
        if self.rounds:
            self.now += self.rounds.pop()


recorded_clock = RecordedClock()
