"""Proves a GPU: builds, tests, looks for bad memory accesses, measures, and ends with one table.

    make gpu-check                        # into benchmarks/records/
    make gpu-check OUT=/somewhere WHEELS=folder/of/wheels

Needs torch, Triton, pytest and pytest-benchmark, no network. Whatever else is missing is skipped and named. Ends in
under nine minutes on one H200; every phase has its share of the time and is stopped when that is over.
`--dry-run` goes through all of it on a CPU at toy sizes and proves nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

from benchmarks.machine import ROOT, device_slug
from benchmarks.predictions import PREDICTIONS, projected_hours
from benchmarks.records import FOLDER, Record, read

# Most important first: the time may run out.
BENCHMARKS = (
    "bench_mim_step.py",
    "bench_step_options.py",
    "bench_attention.py",
    "bench_tokenizer.py",
    "bench_pointwise.py",
    "bench_optimizer.py",
    "bench_backbone.py",
    "bench_block.py",
)
NEEDED = ("pytest", "pytest_benchmark", "triton")
OPTIONAL = {
    "nvidia.dali": "the input pipeline",
    "xformers": "its attention as a rival",
    "liger_kernel": "its kernels as rivals",
    "timm": "its models as rivals",
    "transformers": "its models as rivals",
    "tyro": "the recipes' command line",
}
STEPS = {
    r"^pre-training, whole step with DALL-E": "tokens made in the step",
    r"^options of our own step": "tokens from the cache",
}
SECONDS = {"build": 60, "tests": 130, "sanitizer": 60, "benchmarks": 270}


@dataclass
class Phase:
    """What came of one phase: `state` is ok, failed, skipped or out of time."""

    name: str
    state: str
    what: str
    seconds: float = 0.0


@dataclass
class Check:
    """One run of the whole check."""

    out: Path
    wheels: Path | None = None
    dry_run: bool = False
    only: tuple[str, ...] = ()
    phases: list[Phase] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(self, name: str, command: list[str], limit_s: float, keep: str | None = None) -> str:
        """Runs a phase, shows its output as it comes, and returns it; `keep` is a pattern of the line to report."""
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        lines: list[str] = []
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job; the phase would inherit it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        late = threading.Event()
        watchdog = threading.Timer(limit_s, _stop, (process, late))
        watchdog.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        code = process.wait()
        watchdog.cancel()
        seconds = time.perf_counter() - start
        found = [line for line in lines if keep is None or re.search(keep, line)]
        what = found[-1].strip("= ") if found else (lines[-1] if lines else "no output")
        state = "out of time" if late.is_set() else "ok" if code == 0 else "failed"
        self.phases.append(Phase(name, state, what, seconds))
        return "\n".join(lines)

    def skip(self, name: str, reason: str) -> None:
        print(f"\n== {name}: skipped, {reason}", flush=True)
        self.phases.append(Phase(name, "skipped", reason))

    def install_wheels(self) -> None:
        if self.wheels is None:
            return
        files = sorted(str(path) for path in self.wheels.glob("*.whl"))
        if not files:
            self.skip("wheels", f"{self.wheels} holds no .whl")
            return
        site = Path(tempfile.mkdtemp(prefix="beit_fast_site_"))
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        self.run("wheels", [*install, "--target", str(site), *files], SECONDS["build"])
        paths = [str(site), *filter(None, [self.environment.get("PYTHONPATH")])]
        self.environment["PYTHONPATH"] = os.pathsep.join(paths)

    def missing(self) -> dict[str, str]:
        """Optional packages that are not there, asked of the interpreter that will run the phases."""
        code = (
            "import importlib.util, json\ndef have(name):\n try: return importlib.util.find_spec(name) is not None\n"
            f" except ModuleNotFoundError: return False\nprint(json.dumps([n for n in {[*NEEDED, *OPTIONAL]!r} "
            "if not have(n)]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=self.environment, capture_output=True, text=True
        )
        names = json.loads(done.stdout)
        return {name: OPTIONAL.get(name, "needed") for name in names}

    def build(self) -> None:
        """The C++ module, in place, unless it is there."""
        if list((ROOT / "beit_fast").glob("_C.*.so")) and _imports("beit_fast._C"):
            self.skip("build", "beit_fast._C is built already")
        elif not shutil.which("cmake") and importlib.util.find_spec("cmake") is None:
            self.skip("build", "no cmake: beit_fast._C stays unbuilt, and what needs the samplers is not measured")
        else:
            self.run("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], SECONDS["build"])

    def tests(self) -> None:
        tests = sorted((ROOT / "tests").rglob("test_*.py"))
        marked = [str(p.relative_to(ROOT)) for p in tests if re.search(r"mark\.gpu|triton_device", p.read_text())]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", *marked, "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors"]  # a file that needs what is missing must not hide the others
        command += ["--collect-only"] if self.dry_run else ["--maxfail", "50"]
        self.run("GPU tests", command, SECONDS["tests"], keep=r"passed|failed|error|selected|collected|deselected")

    def sanitizer(self) -> None:
        tool = shutil.which("compute-sanitizer") or _cuda_tool("compute-sanitizer")
        script = [sys.executable, "-m", "benchmarks.small_shapes"]
        if self.dry_run:
            self.run("small shapes", [*script, "--device", "cpu"], SECONDS["sanitizer"])
        elif tool is None:
            self.skip("compute-sanitizer", "not installed")
            self.run("small shapes", script, SECONDS["sanitizer"])
        else:
            command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *script]
            self.run("compute-sanitizer", command, SECONDS["sanitizer"], keep="ERROR SUMMARY|not supported|Error")

    def benchmarks(self) -> Record | None:
        device = torch.device("cpu" if self.dry_run else "cuda")
        subject = "gpu_check_dry_run" if self.dry_run else "gpu_check"
        path = self.out / f"{date.today().isoformat()}_{device_slug(device)}_{subject}.json"
        number = 2
        while path.exists():
            path = path.with_name(f"{path.stem.rsplit('-run', 1)[0]}-run{number}.json")
            number += 1
        chosen = [name for name in self.only or BENCHMARKS if (ROOT / "benchmarks" / name).exists()]
        options = ["--benchmark-only", "--benchmark-json", str(path), "-p", "no:cacheprovider"]
        if self.dry_run:
            options += ["--tiny", "--bench-device", "cpu"]
        else:
            options += ["--pairs", "15", "--stop-after", str(SECONDS["benchmarks"] - 60)]
        files = [f"benchmarks/{name}" for name in chosen]
        self.run("benchmarks", [sys.executable, "-m", "pytest", *files, *options], SECONDS["benchmarks"],
                 keep=r"passed|failed|error")  # fmt: skip
        return read(path) if path.exists() else None


def _stop(process: subprocess.Popen[str], late: threading.Event) -> None:
    """Interrupts a phase whose time is over, so that pytest still writes what it has; then ends it."""
    late.set()
    for sign, patience_s in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _imports(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True).returncode == 0


def _cuda_tool(name: str) -> str | None:
    for home in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda")):
        path = Path(home) / "bin" / name
        if path.exists():
            return str(path)
    return None


def result_table(record: Record | None) -> list[str]:
    """beit_fast's time, the best rival's ratio, the prediction, for each comparison."""
    if record is None:
        return ["no benchmark was recorded"]
    lines = [f"{'comparison':<88} {'ms':>9} {'predicted':>10} {'images/s':>9} {'MiB':>8}  closest rival"]
    for group, rows in record.groups().items():
        ours = next((row for row in rows if row.rival == "beit_fast"), None)
        if ours is None:
            continue
        others = [row for row in rows if row.ratio is not None and not row.rival.startswith("beit_fast")]
        closest = min(others, key=lambda row: row.ratio[0] if row.ratio else 0.0, default=None)
        beside = ""
        if closest is not None and closest.ratio is not None:
            middle, low, high = closest.ratio
            beside = f"{middle:.2f} [{low:.2f}, {high:.2f}] {closest.rival}"
        predicted = next((ms for pattern, ms in PREDICTIONS.items() if re.search(pattern, group)), None)
        images, memory = ours.info.get("images_per_s"), ours.info.get("peak_memory_mib")
        lines.append(
            f"{group[:88]:<88} {1e3 * ours.median_s:9.3f} {f'~{predicted:g}' if predicted else '':>10} "
            f"{f'{images:,.0f}' if images else '':>9} {f'{memory:,.0f}' if memory else '':>8}  {beside}"
        )
        lines += [
            f"  {row.rival:<86} {1e3 * row.median_s:9.3f} {'':>10} {'':>9} {row.info.get('peak_memory_mib') or 0:8,.0f}"
            for row in rows
            if row.rival.startswith("beit_fast, ")
        ]
    lines.append("predicted: arithmetic made before anything was measured, not a measurement")
    return lines


def projections(record: Record | None) -> list[str]:
    """The 800 epochs of the paper on 8 such GPUs, by arithmetic from one GPU's rate."""
    lines = []
    for group, rows in record.groups().items() if record else ():
        tokens = next((text for pattern, text in STEPS.items() if re.search(pattern, group)), None)
        for row in rows:
            if tokens and row.rival.startswith("beit_fast") and "no position bias" not in row.rival:
                hours = projected_hours(row.info["images_per_s"], 8)
                lines.append(f"  {hours:7.1f} h  {group.split(': ')[1]}, {tokens}, {row.rival}")
    if lines:
        lines.insert(0, "projection: 800 epochs of ImageNet-1k on 8 of these, at eight times one GPU's rate (gradients "
                        "exchanged and images decoded for nothing); the paper: BEiT-B, 120 h on 16 V100")  # fmt: skip
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the record (default: benchmarks/records)")
    parser.add_argument(
        "--wheels", type=Path, default=None, help="folder of wheels to install first, for this run only"
    )
    parser.add_argument("--dry-run", action="store_true", help="every phase on a CPU at toy sizes")
    parser.add_argument("--only", nargs="*", default=(), metavar="FILE", help="these benchmark files instead of all")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print(
            "gpu-check needs a CUDA GPU, and torch sees none here (torch.cuda.is_available() is False)", file=sys.stderr
        )
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    check = Check(given.out.resolve(), given.wheels, given.dry_run, tuple(given.only))
    started = time.perf_counter()
    check.install_wheels()
    missing = check.missing()
    if needed := [name for name, use in missing.items() if use == "needed"]:
        print(f"gpu-check needs {', '.join(needed)}: install it, or put its wheel into WHEELS=folder", file=sys.stderr)
        return 1
    check.build()
    check.tests()
    check.sanitizer()
    record = check.benchmarks()
    print("\n" + "\n".join([*result_table(record), *projections(record), ""]))
    if missing:
        print("not installed: " + "; ".join(f"{name} ({use})" for name, use in missing.items()))
    for phase in check.phases:
        print(f"{phase.name:<18} {phase.state:<12} {phase.seconds:6.0f} s  {phase.what[:100]}")
    print(f"{'all':<18} {'':<12} {time.perf_counter() - started:6.0f} s  record: {record.path if record else 'none'}")
    if check.dry_run:
        print("dry run on a CPU: nothing above says anything about a GPU")
    return 1 if record is None or any(p.state in ("failed", "out of time") for p in check.phases) else 0


if __name__ == "__main__":
    sys.exit(main())
