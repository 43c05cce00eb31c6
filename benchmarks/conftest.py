"""What all benchmarks share: sizes, interleaved rounds, and what a record says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from benchmarks.clocks import recorded_clock
from benchmarks.harness import OURS, Comparison, Disagreement, Measured, measure_interleaved
from benchmarks.machine import environment

IMPORTANCE = (
    "mim_step", "backbone", "drop_in", "input_pipeline", "tokenizer", "finetune_loop", "optimizer", "token_cache",
    "beitv2_step", "attention", "mask_sampler", "segmentation", "step_options", "import_time", "opening", "checkpoint",
    "position_bias", "residual", "gelu", "mim_loss", "linear_argmax", "waterfall",
)  # fmt: skip
"""Files in the order in which they are measured, without `bench_`."""
SHORT_AFTER = 0.25
"""Share of the time after which comparisons get one round each."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beit_fast")
    group.addoption("--full", action="store_true", help="all sizes, BEiT-L and 384 px among them (default: minutes)")
    group.addoption("--tiny", action="store_true", help="toy sizes that only show that everything runs")
    group.addoption("--pairs", type=int, default=None, help="fewest rounds of a comparison (default 3; 15 with --full)")
    group.addoption("--stop-after", type=float, default=None, metavar="S",
                    help="start no comparison after S seconds (default 460; --full: no limit)")  # fmt: skip
    group.addoption(
        "--cpu-time",
        action="store_true",
        help="seconds of CPU instead of the wall clock: for a CPU that is busy with something else too",
    )
    group.addoption("--bench-device", default=None, help="cpu or cuda (default: cuda where there is one)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full") and config.getoption("--tiny"):
        raise pytest.UsageError("--full and --tiny: choose one")


def device_of(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Scale:
    """How much to measure: `name` is tiny, default or full; `pairs` the fewest rounds, None where not given."""

    name: str
    device: torch.device
    asked_pairs: int | None = None

    @property
    def pairs(self) -> int:
        """Fewest rounds of a comparison."""
        return self.asked_pairs or {"tiny": 2, "default": 3, "full": 15}[self.name]

    def pick(self, *, tiny: Any, cpu: Any, gpu: Any, full: Any = None) -> Any:
        """The value for this scale; `full` (default: that of the device) for --full."""
        if self.name == "tiny":
            return tiny
        if self.name == "full" and full is not None:
            return full
        return gpu if self.device.type == "cuda" else cpu

    @property
    def dtype(self) -> str:
        """Of activations: bfloat16 on a GPU, float32 on a CPU."""
        return "bfloat16" if self.device.type == "cuda" else "float32"


def scale_of(config: pytest.Config) -> Scale:
    name = "tiny" if config.getoption("--tiny") else "full" if config.getoption("--full") else "default"
    return Scale(name, device_of(config), config.getoption("--pairs"))


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    return scale_of(request.config)


class Rounds:
    """Measures each comparison once, when the test of its first row asks, and keeps what was measured.

    In the default scale comparisons that start late get one round each, so that all of them are measured.
    """

    def __init__(self, scale: Scale, stop_after_s: float, cpu_time: bool = False) -> None:
        self.scale, self.stop_after_s, self.cpu_time = scale, stop_after_s, cpu_time
        self.started = time.monotonic()
        self.measured: dict[Hashable, Measured | Disagreement] = {}

    def of(self, key: Hashable, make: Callable[[], Comparison], budget_s: float) -> Measured:
        if key not in self.measured:
            elapsed = self.check_time()
            tiny, late = self.scale.name == "tiny", elapsed > SHORT_AFTER * self.stop_after_s
            share = {"tiny": 0.0, "default": 0.0 if late else 0.25, "full": 1.0}[self.scale.name]
            pairs = self.scale.asked_pairs or (1 if late and self.scale.name == "default" else self.scale.pairs)
            try:
                comparison = make()
                if self.cpu_time:
                    comparison = replace(comparison, clock="cpu")
                self.measured[key] = measure_interleaved(
                    comparison, self.scale.device, pairs=pairs, most_pairs=3 if tiny else 31, budget_s=budget_s * share,
                    call_s=0.001 if tiny else 0.03,
                )  # fmt: skip
            except Disagreement as error:
                self.measured[key] = error
        found = self.measured[key]
        if isinstance(found, Disagreement):
            raise found
        return found

    def check_time(self) -> float:
        """Seconds since the start; skips the test where the time for starting comparisons is over."""
        elapsed = time.monotonic() - self.started
        if elapsed > self.stop_after_s:
            pytest.skip(f"no comparison is started after {self.stop_after_s:.0f} s: --stop-after")
        return elapsed

    @staticmethod
    def replay(benchmark: Any, seconds: list[float]) -> None:
        """Make recorded times the rounds of a row of the table."""
        rounds = recorded_clock.load(seconds)
        benchmark.pedantic(recorded_clock.next_round, rounds=rounds)


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest, scale: Scale) -> Rounds:
    given = request.config.getoption("--stop-after")
    return Rounds(scale, given if given is not None else math.inf if scale.name == "full" else 460.0,
                  request.config.getoption("--cpu-time"))  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `case` runs for each of its module's `cases(scale)`, a dict by id."""
    if "case" in metafunc.fixturenames:
        found = metafunc.module.cases(scale_of(metafunc.config))
        metafunc.parametrize("case", list(found.values()), ids=list(found))


@pytest.fixture
def interleaved(request: pytest.FixtureRequest, benchmark: Any, rounds: Rounds) -> Callable[..., Measured]:
    """`interleaved(key, make, name)`: the row of one implementation in the comparison that `make()` describes.

    All tests of a file with the same key share one measurement. Who cannot take part is skipped with the reason.
    """

    def report(key: Hashable, make: Callable[[], Comparison], name: str, budget_s: float = 10.0) -> Measured:
        try:
            measured = rounds.of((request.path, key), make, budget_s)
        except BaseException:
            benchmark.skipped = True
            raise
        if name not in measured.seconds:
            benchmark.skipped = True
            pytest.skip(measured.unavailable.get(name, "does not take part here"))
        benchmark.group = measured.comparison.group
        benchmark.extra_info.update(measured.report(name))
        rounds.replay(benchmark, measured.seconds[name])
        return measured

    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most important first, because time may run out."""
    rank = {name: number for number, name in enumerate(IMPORTANCE)}
    items.sort(key=lambda item: rank.get(item.path.stem.removeprefix("bench_"), len(rank)))
    for item in items:
        if "rounds" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=recorded_clock))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["beit_fast"] = environment(device_of(config)) | {"scale": scale_of(config).name}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if b.extra_info.get("rival") != OURS]
    write_ratios(terminalreporter, rows, "over_beit_fast", "times as long as beit_fast")
    write_ratios(terminalreporter, rows, "gain", "times as fast as the row before")


def write_ratios(terminalreporter: Any, rows: list[Any], key: str, title: str) -> None:
    rows = [b for b in rows if key in b.extra_info]
    if rows:
        terminalreporter.section(f"{title}: median of the rounds and its 95 % interval")
    for group in dict.fromkeys(b.group for b in rows):
        terminalreporter.write_line(group)
        for b in rows:
            if b.group == group:
                ratio = b.extra_info[key]
                terminalreporter.write_line(
                    f"  {ratio['median']:7.2f}  [{ratio['low']:.2f}, {ratio['high']:.2f}]  n={ratio['pairs']:<3}"
                    f" {b.extra_info['rival']}"
                )
