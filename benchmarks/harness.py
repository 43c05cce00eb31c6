"""Implementations of the same work, measured in interleaved rounds: the one way all benchmarks measure.

On a machine that is also busy with something else, two timings made one after the other say little. Here every one runs
once per round, in a random order, and what is reported is the ratio within a round: its median over the rounds, and an
interval that assumes no distribution. Before anything is timed, the results are compared.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import comb
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_fast.cli.gpus import GPUS
from benchmarks.clocks import Clock, CpuClock, ceilings, count_launches
from benchmarks.memory import PeakMemory, keep_freed_memory

OURS = "beit_fast"


FLOORS = {"float32": 2e-6, "float16": 2.5e-4, "bfloat16": 2e-3}
"""Relative errors against fp64 that are never held against anyone."""
OURS_OVER_EAGER, THEIRS_OVER_EAGER = 1.2, 3.0
"""How much larger than that of plain operations in the same dtype the error against fp64 may be: ours by the rule of
the kernels; a baseline owes us no accuracy, but with three times the error it computes something else."""


class Unavailable(Exception):
    """A baseline cannot take part on this machine; the message is the reason."""


class Disagreement(AssertionError):
    """An implementation computes something else, so its time would mean nothing."""


@dataclass
class Implementation:
    """One way to do the work.

    Args:
        run: does it once; what it returns is ignored.
        result: does it once and gives what must be the same for all, by name; None: there is nothing to compare.
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
        implementations: name -> builder, beit_fast first. A builder raises `Unavailable` where its library is missing.
        shapes: sizes by name, for the record.
        dtype: that of the activations.
        flops, bytes: work of one call: multiply-adds count two, and every input and output is moved once. The same for
            all, whatever they do besides.
        images: images in one call, where there are any.
        tolerance: largest relative error (Frobenius) against beit_fast's results, in fp32.
        exact: the results in fp64, and by plain operations in the dtype of the activations. Where it is given, errors
            are those against fp64, and judged by those of the plain operations.
        compared_by: replaces that comparison: (ours, theirs) -> errors by name; raises `Disagreement`.
        clock: "wall", or "cpu": seconds of CPU time of all threads and child processes, those that work ahead included.
    """

    group: str
    implementations: Mapping[str, Callable[[], Implementation]]
    shapes: Mapping[str, Any]
    dtype: str = "float32"
    flops: float | None = None
    bytes: float | None = None
    images: int | None = None
    tolerance: float = 1e-4
    exact: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] | None = None
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
    unavailable: dict[str, str] = field(default_factory=dict)
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
        if case.flops and (peak := peak_flops_per_s(self.device, case.dtype)):
            row["mfu"] = case.flops / middle / peak
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


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph: each call replays it and gives what it gave while it was recorded.

    Raises:
        Unavailable: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise Unavailable("CUDA graphs need a GPU")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def peak_flops_per_s(device: torch.device, dtype: str) -> float | None:
    """Dense peak of the tensor cores by the data sheet; None for fp32, a CPU and a GPU that is not listed."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((gpu.peak_flops_per_s for key, gpu in GPUS.items() if key.split("-")[0] in name), None)


def measure_interleaved(
    comparison: Comparison, device: torch.device, *, pairs: int = 7, most_pairs: int = 31, budget_s: float = 10.0,
    call_s: float = 0.03,
) -> Measured:  # fmt: skip
    """Build the implementations, compare their results, and time them in interleaved rounds for about `budget_s`.

    Args:
        pairs, most_pairs: fewest and most rounds, whatever the budget says.
        call_s: in a round a fast one is called as often as takes this long.

    Raises:
        Disagreement: someone's results are something else.
    """
    # without the implementations: they hold models and inputs, and the result outlives them
    measured = Measured(replace(comparison, implementations={}, exact=None), device, load=os.getloadavg()[0])
    keep_freed_memory()
    built: dict[str, Implementation] = {}
    for name, build in comparison.implementations.items():
        try:
            built[name] = build()
        except (Unavailable, ImportError) as reason:
            measured.unavailable[name] = str(reason) or type(reason).__name__
        except Exception as error:
            _leave_out(name, error, measured)
    _compare(comparison, built, measured)
    probes = ceilings(device, comparison.dtype) if comparison.flops or comparison.bytes else {}
    clock = CpuClock() if comparison.clock == "cpu" else Clock(device)
    took: dict[str, float] = {}
    for name, one in built.items():
        with PeakMemory(device) as peak:
            took[name] = clock.time(one, 1)
        measured.peak_memory_mib[name] = peak.mib
        if took[name] < 1.0:  # what is slow is warm by now
            took[name] = min(took[name], clock.time(one, 1))
        if device.type == "cuda" and comparison.images:
            measured.info[name] = {"launches": count_launches(one.run)}
        measured.calls[name] = max(1, min(1000, round(call_s / max(took[name], 1e-7))))
        measured.info[name] = measured.info.get(name, {}) | one.info
    round_s = sum(took[name] * measured.calls[name] for name in built) + 0.05 * len(probes)
    rounds = max(pairs, min(most_pairs, int(budget_s / max(round_s, 1e-9))))
    measured.seconds = {name: [] for name in built}
    measured.probes = {name: [] for name in probes}
    order, generator = list(built), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)  # in a fixed cycle each would always follow the same other one
        for name in order:
            measured.seconds[name].append(clock.time(built[name], measured.calls[name]))
        for name, probe in probes.items():
            measured.probes[name].append(probe.work / clock.time(Implementation(probe.run), 1))
    return measured


def _compare(comparison: Comparison, built: dict[str, Implementation], measured: Measured) -> None:
    """Compare every result with ours, or with fp64 where the comparison has it; `Disagreement` names who differs."""
    ours = built.get(OURS)
    if ours is None or ours.result is None:
        return
    compare = comparison.compared_by or (lambda a, b: relative_errors(a, b, comparison.tolerance))
    exact = comparison.exact() if comparison.exact else None
    expected = {} if exact else ours.result()
    for name, one in list(built.items()):
        if one.result is None or (name == OURS and not exact):
            continue
        try:
            found = one.result()
            measured.errors[name] = (
                errors_against_fp64(found, *exact, name == OURS, comparison.dtype)
                if exact
                else compare(expected, found)
            )
        except Disagreement as error:
            raise Disagreement(f"{comparison.group}: {name} computes something else: {error}") from None
        except Exception as error:
            del built[name]
            _leave_out(name, error, measured)


def _leave_out(name: str, error: Exception, measured: Measured) -> None:
    """A baseline that fails takes no part, and says why; that we fail is an error."""
    if name == OURS:
        raise error
    lines = str(error).strip().splitlines()
    measured.unavailable[name] = f"fails here: {type(error).__name__}{': ' + lines[0] if lines else ''}"


def errors_against_fp64(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], eager: Mapping[str, Tensor], ours: bool, dtype: str
) -> dict[str, float]:
    """Relative errors against fp64; `Disagreement` where one is above that of plain operations by more than allowed."""
    allowed = relative_errors(exact, eager, math.inf)
    errors = relative_errors(exact, found, math.inf)
    factor = OURS_OVER_EAGER if ours else THEIRS_OVER_EAGER
    for name, error in errors.items():
        limit = max(factor * allowed[name], FLOORS[dtype])
        if not error <= limit:
            raise Disagreement(f"{name} is {error:.2e} from fp64, plain operations in {dtype} are {allowed[name]:.2e}")
    return errors


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
