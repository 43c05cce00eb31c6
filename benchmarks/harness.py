"""Rivals that take turns: the one way all benchmarks measure.

On a machine that is also busy with something else, two timings made one after the other say little. Here every rival
runs once per round, in a random order, and what is reported is the ratio within a round: its median over the
rounds, and an interval that assumes no distribution. Before anything is timed, the results are compared.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import comb
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.memory import PeakMemory, keep_freed_memory

OURS = "beit_fast"


class Absent(Exception):
    """This rival cannot take part on this machine; the message is the reason."""


class Disagreement(AssertionError):
    """A rival computes something else, so its time would mean nothing."""


@dataclass
class Rival:
    """One way to do the work.

    Args:
        run: does it once; what it returns is ignored.
        result: does it once and gives what must be the same for all rivals, by name; None: there is nothing to compare.
        prepare: runs before every timed call, outside the clock.
        info: more about it, for the record.
    """

    run: Callable[[], Any]
    result: Callable[[], Mapping[str, Tensor]] | None = None
    prepare: Callable[[], None] | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One group of the table.

    Args:
        group: its title; says what is done, on what, and how much of it at once.
        rivals: name -> builder, beit_fast first. A builder raises `Absent` where its library is missing.
        shapes: sizes by name, for the record.
        dtype: that of the activations.
        flops, bytes: work of one call: multiply-adds count two, and every input and output is moved once. The same for
            all rivals, whatever they do besides.
        images: images in one call, where there are any.
        tolerance: largest relative error (Frobenius) against beit_fast's results.
        compared_by: replaces that comparison: (ours, theirs) -> errors by name; raises `Disagreement`.
        clock: "wall", or "cpu": seconds of CPU time of all threads of the process, those that work ahead included.
    """

    group: str
    rivals: Mapping[str, Callable[[], Rival]]
    shapes: Mapping[str, Any]
    dtype: str = "float32"
    flops: float | None = None
    bytes: float | None = None
    images: int | None = None
    tolerance: float = 1e-4
    compared_by: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, float]] | None = None
    clock: str = "wall"


class Ratio(NamedTuple):
    """How many times as long as beit_fast: the median over the rounds and its 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int


def ratio_of(slow: list[float], fast: list[float]) -> Ratio:
    """The ratio of two columns of interleaved times. The interval is made of order statistics."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    rank = interval_rank(len(ratios))
    return Ratio(median(ratios), ratios[rank], ratios[-1 - rank], len(ratios))


def interval_rank(count: int, level: float = 0.95) -> int:
    """How many values to leave out at either end so that the rest holds the median with probability `level`.

    With few values even all of them may not; then none is left out.
    """
    outside, rank = 0.0, 0
    for k in range(count // 2):
        outside += 2 * comb(count, k) / 2**count
        if outside > 1 - level:
            break
        rank = k + 1
    return max(rank - 1, 0)


@dataclass
class Measured:
    """What the rounds of one comparison gave."""

    comparison: Comparison
    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_memory_mib: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    probes: dict[str, list[float]] = field(default_factory=dict)
    """Rates of the machine's own ceilings in the same rounds: `matmul` in FLOP/s, `copy` in bytes/s."""
    load: float = 0.0

    def over_ours(self, name: str) -> Ratio | None:
        return ratio_of(self.seconds[name], self.seconds[OURS]) if OURS in self.seconds else None

    def report(self, name: str) -> dict[str, Any]:
        """One row of the record; a number carries its unit in its name."""
        case, times = self.comparison, self.seconds[name]
        middle = median(times)
        quarter, _, three_quarters = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        row: dict[str, Any] = {
            "rival": name,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in case.shapes.items()},
            "dtype": case.dtype,
            "clock": case.clock,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "calls_per_round": self.calls[name],
            "quartiles_ms": [1e3 * quarter, 1e3 * three_quarters],
            "peak_memory_mib": self.peak_memory_mib.get(name),
            "load_average": self.load,
            "errors": self.errors.get(name, {}),
            **self.info.get(name, {}),
        }
        if (ratio := self.over_ours(name)) is not None:
            row["over_beit_fast"] = ratio._asdict()
        if case.images:
            row["images_per_s" if case.clock == "wall" else "images_per_cpu_s"] = case.images / middle
        for work, rate, unit, ceiling in (
            (case.flops, "gflop_per_s", 1e9, "matmul"),
            (case.bytes, "gb_per_s", 1e9, "copy"),
        ):
            if work:
                row[rate] = work / middle / unit
                if self.probes.get(ceiling):
                    shares = [work / t / probe for t, probe in zip(times, self.probes[ceiling], strict=True)]
                    row[f"share_of_{ceiling}"] = median(shares)
        return row


def measure(
    comparison: Comparison,
    device: torch.device,
    *,
    pairs: int = 7,
    most_pairs: int = 31,
    budget_s: float = 10.0,
    turn_s: float = 0.03,
) -> Measured:
    """Builds the rivals, compares their results, and lets them take turns for about `budget_s` seconds.

    Args:
        pairs, most_pairs: fewest and most rounds, whatever the budget says.
        turn_s: a turn of a fast rival is as many calls as take this long.

    Raises:
        Disagreement: a rival's results are not ours.
    """
    # without the rivals: they hold models and inputs, and the result outlives them
    measured = Measured(replace(comparison, rivals={}), device, load=os.getloadavg()[0])
    keep_freed_memory()
    rivals: dict[str, Rival] = {}
    for name, build in comparison.rivals.items():
        try:
            rivals[name] = build()
        except (Absent, ImportError) as reason:
            measured.absent[name] = str(reason) or type(reason).__name__
        except Exception as error:
            _leave_out(name, error, measured)
    _compare(comparison, rivals, measured)
    probes = ceilings(device, comparison.dtype) if comparison.flops or comparison.bytes else {}
    clock = CpuClock() if comparison.clock == "cpu" else Clock(device)
    took: dict[str, float] = {}
    for name, rival in rivals.items():
        with PeakMemory(device) as peak:
            took[name] = clock.time(rival, 1)
        measured.peak_memory_mib[name] = peak.mib
        if took[name] < 1.0:  # what is slow is warm by now
            took[name] = min(took[name], clock.time(rival, 1))
        measured.calls[name] = max(1, min(1000, round(turn_s / max(took[name], 1e-7))))
        measured.info[name] = rival.info
    round_s = sum(took[name] * measured.calls[name] for name in rivals) + 0.05 * len(probes)
    rounds = max(pairs, min(most_pairs, int(budget_s / max(round_s, 1e-9))))
    measured.seconds = {name: [] for name in rivals}
    measured.probes = {name: [] for name in probes}
    order, generator = list(rivals), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)  # in a fixed cycle each would always follow the same other one
        for name in order:
            measured.seconds[name].append(clock.time(rivals[name], measured.calls[name]))
        for name, probe in probes.items():
            measured.probes[name].append(probe.work / clock.time(Rival(probe.run), 1))
    return measured


def _compare(comparison: Comparison, rivals: dict[str, Rival], measured: Measured) -> None:
    ours = rivals.get(OURS)
    if ours is None or ours.result is None:
        return
    expected = ours.result()
    compare = comparison.compared_by or (lambda a, b: relative_errors(a, b, comparison.tolerance))
    for name, rival in list(rivals.items()):
        if name != OURS and rival.result is not None:
            try:
                measured.errors[name] = compare(expected, rival.result())
            except Disagreement as error:
                raise Disagreement(f"{comparison.group}: {name} computes something else: {error}") from None
            except Exception as error:
                del rivals[name]
                _leave_out(name, error, measured)


def _leave_out(name: str, error: Exception, measured: Measured) -> None:
    """A rival that fails takes no part, and says why; that we fail is an error."""
    if name == OURS:
        raise error
    lines = str(error).strip().splitlines()
    measured.absent[name] = f"fails here: {type(error).__name__}{': ' + lines[0] if lines else ''}"


def relative_errors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float) -> dict[str, float]:
    """||found - expected|| / ||expected|| of every tensor; `Disagreement` where one is above the tolerance."""
    if expected.keys() != found.keys():
        raise Disagreement(f"it gives {sorted(found)}, not {sorted(expected)}")
    errors = {}
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape:
            raise Disagreement(f"{name} is {tuple(other.shape)}, not {tuple(tensor.shape)}")
        wide = torch.float64 if tensor.device.type == "cpu" and tensor.numel() < 1 << 22 else torch.float32
        difference = (other.to(wide) - tensor.to(wide)).norm()
        error = float(difference / tensor.to(wide).norm().clamp_min(1e-30))
        if not error <= tolerance:
            raise Disagreement(f"{name} differs by {error:.2e}, more than {tolerance:.0e}")
        errors[name] = error
    return errors


class Clock:
    """Seconds per call, waiting for the device before the first and after the last.

    On a GPU a turn of several calls is timed call by call with events, the L2 cache overwritten in between.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def time(self, rival: Rival, calls: int) -> float:
        enabled = gc.isenabled()
        gc.disable()
        try:
            if calls > 1 and self.flush is not None:
                return self._by_events(rival, calls)
            return self._by_wall_clock(rival, calls)
        finally:
            if enabled:
                gc.enable()

    def _by_wall_clock(self, rival: Rival, calls: int) -> float:
        run, prepare, elapsed = rival.run, rival.prepare, 0.0
        if prepare is None:
            if calls > 1:
                run()  # not timed: after another's turn caches and allocator are as that one left them
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

    def _by_events(self, rival: Rival, calls: int) -> float:
        assert self.flush is not None
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        self.wait()
        for start, end in events:
            if rival.prepare is not None:
                rival.prepare()
            self.flush.zero_()
            start.record()
            rival.run()
            end.record()
        self.wait()
        return median(start.elapsed_time(end) for start, end in events) / 1e3

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class CpuClock:
    """Seconds of CPU time per call, of all threads: from when none works ahead any more to when none does again."""

    def time(self, rival: Rival, calls: int) -> float:
        elapsed = 0.0
        for _ in range(calls):
            if rival.prepare is not None:
                rival.prepare()
            self.settle()
            start = time.process_time()
            rival.run()
            self.settle()
            elapsed += time.process_time() - start
        return elapsed / calls

    @staticmethod
    def settle() -> None:
        while True:
            before = time.process_time()
            time.sleep(0.05)
            if time.process_time() - before < 0.002:
                return


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
