"""Proves a GPU: builds, tests, looks for bad memory accesses, measures, trains, and ends with one table.

    make gpu-check                        # into benchmarks/records/; limits of nine minutes in all
    make gpu-check ONLY=attention         # one part: step, attention, tokenizer, input or recipes
    make gpu-check OUT=/somewhere WHEELS=folder/of/wheels

Needs torch, Triton, pytest and pytest-benchmark, no network; what else is missing is skipped and named.
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
from benchmarks.records import FOLDER, Record, read


@dataclass(frozen=True)
class Part:
    """What `--only` chooses: benchmark files, most important first, and a pattern of the GPU tests that go along."""

    benchmarks: tuple[str, ...]
    tests: str


PARTS = {
    "step": Part(("mim_step", "step_options", "backbone", "optimizer"), r"tests/(train|models)/"),
    "attention": Part(("attention",), r"tests/kernels/.*(attention|position_bias)"),
    "tokenizer": Part(("tokenizer", "linear_argmax"), r"tests/tokenizers/|tests/kernels/.*(conv|linear_argmax)"),
    "input": Part(("input_pipeline",), r"tests/data/|tests/kernels/.*jitter"),
    "recipes": Part((), r"tests/(cli|recipes|train/distributed)/"),
}
MORE = ("residual", "gelu", "mim_loss", "segmentation", "drop_in")
"""Benchmarks of the whole check only."""
FROM_FILES = "--data.path {folder}/jpeg --batch-size 256 --batch-per-device 256"
RECIPES = (
    f"pretrain_beit_base --max-steps 30 {FROM_FILES}",
    f"pretrain_beit_base --max-steps 40 {FROM_FILES}",  # continues
    f"pretrain_beit_base --max-steps 40 {FROM_FILES} --cuda-graph --output-dir {{folder}}/cuda_graph",
    f"pretrain_beit_base --max-steps 40 {FROM_FILES} --data.view-cycle 1 --output-dir {{folder}}/cached_tokens",
    f"pretrain_beit_base --max-steps 20 {FROM_FILES} --compile --output-dir {{folder}}/compile",
    "finetune_imagenet_base --max-steps 4",
    "finetune_imagenet_384 --max-steps 2",
    "linear_probe --max-steps 4",
    "segment_ade20k_base --max-steps 4",
    "pretrain_beit_large --max-steps 4",
    "pretrain_beitv2_base --max-steps 6 --cuda-graph",
    "train_tokenizer_vqkd --max-steps 4 --teacher.name random",
)
"""Recipes that are run for some steps, from JPEG files of 500 x 375 pixels or on built-in images; where there are no
weights of DALL-E, random ones are made."""
FILES = 512
NEEDED = ("pytest", "pytest_benchmark", "triton")
OPTIONAL = {
    "nvidia.dali": "the input pipeline",
    "xformers": "its attention as a baseline",
    "liger_kernel": "its kernels as baselines",
    "timm": "its models as baselines",
    "transformers": "its models as baselines",
    "tyro": "the recipes' command line",
}
IMAGENET_IMAGES, EPOCHS = 1_281_167, 800
STEPS = {
    r"^pre-training, whole step with DALL-E": "tokens made in the step",
    r"^options of our own step": "tokens from the cache",
}
SECONDS = {"build": 50, "tests": 110, "sanitizer": 50, "benchmarks": 220, "recipes": 90}
SECONDS_ONLY = {"build": 50, "tests": 25, "sanitizer": 0, "benchmarks": 60, "recipes": 100}
"""Of each phase, in full (nine minutes in all) and of one part; neither has been timed on a GPU."""


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
    only: str | None = None
    phases: list[Phase] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def seconds(self) -> dict[str, int]:
        budget = SECONDS_ONLY if self.only else SECONDS
        return {name: 6 * limit for name, limit in budget.items()} if self.dry_run else budget  # a CPU may be busy

    def run(self, name: str, command: list[str], limit_s: float, keep: str | None = None) -> str:
        """Runs a phase, shows its output as it comes, and returns it; `keep` is a pattern of the line to report."""
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        lines: list[str] = []
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job; the phase would inherit it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True
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
        self.run("wheels", [*install, "--target", str(site), *files], self.seconds["build"])
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
            self.run("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], self.seconds["build"])

    def tests(self) -> None:
        tests = [p.relative_to(ROOT) for p in sorted((ROOT / "tests").rglob("test_*.py"))]
        pattern = PARTS[self.only].tests if self.only else ""
        marked = [str(p) for p in tests if re.search(pattern, str(p)) and _has_gpu_tests(ROOT / p)]
        if not marked:
            self.skip("GPU tests", f"{self.only} has none")
            return
        command = [sys.executable, "-m", "pytest", "-m", "gpu", *marked, "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors"]  # a file that needs what is missing must not hide the others
        command += ["--collect-only"] if self.dry_run else ["--maxfail", "50"]
        self.run("GPU tests", command, self.seconds["tests"], keep=r"passed|failed|error|selected|collected|deselected")

    def sanitizer(self) -> None:
        if self.only:
            return
        tool = shutil.which("compute-sanitizer") or _cuda_tool("compute-sanitizer")
        script = [sys.executable, "-m", "benchmarks.small_shapes"]
        if self.dry_run:
            self.run("small shapes", [*script, "--device", "cpu"], self.seconds["sanitizer"])
        elif tool is None:
            self.skip("compute-sanitizer", "not installed")
            self.run("small shapes", script, self.seconds["sanitizer"])
        else:
            command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *script]
            self.run("compute-sanitizer", command, self.seconds["sanitizer"], keep="ERROR SUMMARY|not supported|Error")

    def benchmarks(self) -> Record | None:
        device = torch.device("cpu" if self.dry_run else "cuda")
        subject = f"gpu_check{f'_{self.only}' if self.only else ''}{'_dry_run' if self.dry_run else ''}"
        path = self.out / f"{date.today().isoformat()}_{device_slug(device)}_{subject}.json"
        number = 2
        while path.exists():
            path = path.with_name(f"{path.stem.rsplit('-run', 1)[0]}-run{number}.json")
            number += 1
        names = (
            PARTS[self.only].benchmarks if self.only else (*(n for p in PARTS.values() for n in p.benchmarks), *MORE)
        )
        if not names:
            return None
        options = ["--benchmark-only", "--benchmark-json", str(path), "-p", "no:cacheprovider"]
        if self.dry_run:
            options += ["--tiny", "--bench-device", "cpu"]
        else:
            options += ["--pairs", "15", "--stop-after", str(self.seconds["benchmarks"] - 30)]
        files = [f"benchmarks/bench_{name}.py" for name in names]
        self.run("benchmarks", [sys.executable, "-m", "pytest", *files, *options], self.seconds["benchmarks"],
                 keep=r"passed|failed|error")  # fmt: skip
        return read(path) if path.exists() else None

    def recipes(self) -> None:
        """A few steps of each recipe on built-in images; a dry run plans the tiny one only."""
        if self.only not in (None, "recipes"):
            return
        try:  # not before the build: it needs beit_fast._C and Pillow
            from benchmarks.bench_input_pipeline import write_files
        except ImportError as missing:
            self.skip("recipes", f"{missing.name} is not there")
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "jpeg").mkdir()
            write_files(Path(folder) / "jpeg", 0 if self.dry_run else FILES)
            lines = ("pretrain_tiny_builtin --dry-run",) if self.dry_run else RECIPES
            tokenizer = [] if self.dry_run else ["--tokenizer.name", _random_dalle(Path(folder))]
            began = time.perf_counter()
            for line in lines:
                recipe, *options = line.format(folder=folder).split()
                given = tokenizer if recipe.startswith("pretrain") else []
                if "--output-dir" not in options and not self.dry_run:
                    options += ["--output-dir", f"{folder}/{recipe}"]
                left = self.seconds["recipes"] - (time.perf_counter() - began)
                if left < 5:
                    self.skip(line, "the time for recipes is over")
                    continue
                command = [sys.executable, "-m", "beit_fast", "train", recipe, *options, *given]
                name = line.split(" --output-dir")[0].replace(FROM_FILES, "from files")
                self.run(name, command, left, keep="images/s|complete|error")


def _random_dalle(folder: Path) -> str:
    """DALL-E's encoder with random weights of the released shapes, as a file; `dalle` where the real one is there."""
    from beit_fast.tokenizers import load_tokenizer
    from beit_fast.tokenizers.base import TokenizerError
    from beit_fast.tokenizers.dalle import DalleEncoder

    try:
        load_tokenizer("dalle")
    except (TokenizerError, OSError, ValueError):
        from safetensors.torch import save_file

        path = folder / "encoder.safetensors"
        save_file({name: t.contiguous() for name, t in DalleEncoder().state_dict().items()}, path)
        return str(path)
    return "dalle"


def _has_gpu_tests(path: Path) -> bool:
    return bool(re.search(r"mark\.gpu|triton_device", path.read_text()))


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
    """beit_fast's time, rate, share of the data sheet's and of the measured peak, and the closest baseline."""
    if record is None:
        return ["no benchmark was recorded"]
    titles = f"{'ms':>9} {'images/s':>9} {'MFU':>5} {'of peak':>7} {'MiB':>8} {'kernels':>7}  closest baseline"
    lines = [f"{'comparison':<88} {titles}"]
    for group, rows in record.groups().items():
        ours = next((row for row in rows if row.name == "beit_fast"), None)
        if ours is None:
            continue
        others = [row for row in rows if row.ratio is not None and not row.is_ours]
        closest = min(others, key=lambda row: row.ratio[0] if row.ratio else 0.0, default=None)
        beside = ""
        if closest is not None and closest.ratio is not None:
            middle, low, high = closest.ratio
            beside = f"{middle:.2f} [{low:.2f}, {high:.2f}] {closest.name}"
        info = ours.info
        images, memory = info.get("images_per_s"), info.get("peak_memory_mib")
        shares = [f"{share:.0%}" if (share := info.get(key)) else "" for key in ("mfu", "share_of_matmul")]
        lines.append(
            f"{group[:88]:<88} {1e3 * ours.median_s:9.3f} {f'{images:,.0f}' if images else '':>9} "
            f"{shares[0]:>5} {shares[1]:>7} {f'{memory:,.0f}' if memory else '':>8} {info.get('launches', ''):>7}"
            f"  {beside}"
        )
        lines += [
            f"  {row.name:<86} {1e3 * row.median_s:9.3f} {'':>23} {row.info.get('peak_memory_mib') or 0:8,.0f} "
            f"{row.info.get('launches', ''):>7}".rstrip()
            for row in rows
            if row.name.startswith("beit_fast, ")
        ]
    lines.append("MFU: of the data sheet's peak; of peak: of what a matrix product reached in the same rounds")
    return lines


def projections(record: Record | None) -> list[str]:
    """The 800 epochs of the paper on 8 such GPUs, by arithmetic from one GPU's rate."""
    lines = []
    for group, rows in record.groups().items() if record else ():
        tokens = next((text for pattern, text in STEPS.items() if re.search(pattern, group)), None)
        for row in rows:
            if tokens and row.is_ours and "no position bias" not in row.name:
                hours = EPOCHS * IMAGENET_IMAGES / (8 * row.info["images_per_s"]) / 3600
                lines.append(f"  {hours:7.1f} h  {group.split(': ')[1]}, {tokens}, {row.name}")
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
    parser.add_argument("--only", choices=PARTS, help="one part instead of everything")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print(
            "gpu-check needs a CUDA GPU, and torch sees none here (torch.cuda.is_available() is False)", file=sys.stderr
        )
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    check = Check(given.out.resolve(), given.wheels, given.dry_run, given.only)
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
    check.recipes()
    print("\n" + "\n".join([*result_table(record), *projections(record), ""]))
    if missing:
        print("not installed: " + "; ".join(f"{name} ({use})" for name, use in missing.items()))
    for phase in check.phases:
        print(f"{phase.name:<18} {phase.state:<12} {phase.seconds:6.0f} s  {phase.what[:100]}")
    print(f"{'all':<18} {'':<12} {time.perf_counter() - started:6.0f} s  record: {record.path if record else 'none'}")
    if check.dry_run:
        print("dry run on a CPU: nothing above says anything about a GPU")
    nothing = record is None and given.only != "recipes"
    return 1 if nothing or any(p.state in ("failed", "out of time") for p in check.phases) else 0


if __name__ == "__main__":
    sys.exit(main())
