"""`make gpu-check` on a machine without a GPU: one clear line, and a dry run of everything it would do."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Check
from benchmarks.records import read

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "gpu-check needs a CUDA GPU, and torch sees none here (torch.cuda.is_available() is False)\n"
    assert not (tmp_path / "out").exists()


def test_a_phase_reports_its_line_and_how_it_ended(check):
    check.run("fine", [sys.executable, "-c", "print('a'); print('= 3 passed ='); print('b')"], 60, keep="passed")
    check.run("broken", [sys.executable, "-c", "print('1 failed'); raise SystemExit(3)"], 60)
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('2 passed')"
    check.run("late", [sys.executable, "-c", script], 4)  # time enough to start on a busy machine
    check.skip("absent", "not installed")
    assert [(p.name, p.state, p.what) for p in check.phases] == [
        ("fine", "ok", "3 passed"),
        ("broken", "failed", "1 failed"),
        ("late", "out of time", "2 passed"),  # interrupted, so that it can still write what it has
        ("absent", "skipped", "not installed"),
    ]


def test_what_is_missing_is_named(check, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tyro.py").write_text("")
    check.environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    assert not {"pytest", "triton"} & check.missing().keys()
    gpu_check.OPTIONAL["no_such_package"] = "a test"
    try:
        assert check.missing()["no_such_package"] == "a test"
    finally:
        del gpu_check.OPTIONAL["no_such_package"]


def test_wheels_are_installed_for_this_run_only(check, tmp_path):
    """Without network and without touching the environment this runs in."""
    wheel = tmp_path / "wheels" / "a_package_for_this_test-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "a_package_for_this_test-1.0.dist-info"
        archive.writestr("a_package_for_this_test.py", "value = 7\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: a-package-for-this-test\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    check.wheels = wheel.parent
    check.install_wheels()
    assert check.phases[-1].state == "ok"
    out = check.run("use", [sys.executable, "-c", "import a_package_for_this_test as p; print(p.value)"], 60)
    assert out == "7"
    with pytest.raises(ImportError):
        __import__("a_package_for_this_test")


@pytest.fixture
def record(tmp_path):
    group = "options of our own step: BEiT-base plus, 224 px, B=256, bfloat16"
    stats = {"median": 0.05, "q1": 0.049, "q3": 0.051, "rounds": 15}

    def entry(name, ratio):
        over = {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "pairs": 15}
        info = {"rival": name, "images_per_s": 5000.0, "peak_memory_mib": 20000.0, "over_beit_fast": over,
                "mfu": 0.42, "share_of_matmul": 0.51, "launches": 437}  # fmt: skip
        return {"group": group, "stats": stats, "extra_info": info}

    path = tmp_path / "2026-11-21_nvidia-h200_gpu_check.json"
    rows = [entry("beit_fast", 1.0), entry("beit_fast, CUDA graph", 0.9), entry("timm", 1.8), entry("SDPA", 1.4)]
    path.write_text(json.dumps({"benchmarks": rows}))
    return read(path)


def test_the_table_sets_rate_share_of_the_peak_and_closest_baseline_beside_the_time(record):
    lines = gpu_check.result_table(record)
    assert "50.000" in lines[1]
    assert "5,000   42%     51%   20,000     437" in lines[1]
    assert lines[1].endswith("1.40 [1.30, 1.50] SDPA")
    assert "beit_fast, CUDA graph" in lines[2]
    assert lines[2].endswith("20,000     437")
    assert gpu_check.result_table(None) == ["no benchmark was recorded"]


def test_the_projection_is_the_papers_epochs_at_eight_times_the_rate(record):
    first, *rows = gpu_check.projections(record)
    assert first.startswith("projection: 800 epochs of ImageNet-1k on 8")
    assert len(rows) == 2
    assert "7.1 h  BEiT-base plus, 224 px, B=256, bfloat16, tokens from the cache, beit_fast" in rows[0]
    assert gpu_check.projections(None) == []


@pytest.mark.parametrize("only", [None, *gpu_check.PARTS])
def test_the_budgets_end_in_nine_minutes_and_each_part_in_about_two(tmp_path, only):
    check = Check(tmp_path, only=only)
    phases = dict(check.seconds)
    if only is not None and not gpu_check.PARTS[only].benchmarks:
        del phases["benchmarks"]
    elif only is not None:
        del phases["recipes"]
    assert sum(phases.values()) - phases["build"] <= (480 if only is None else 125)
    assert sum(phases.values()) <= 540


def test_every_benchmark_file_of_the_check_and_every_recipe_of_it_exists():
    names = [name for part in gpu_check.PARTS.values() for name in part.benchmarks]
    for name in (*names, *gpu_check.MORE):
        assert (ROOT / "benchmarks" / f"bench_{name}.py").exists()
    for line in gpu_check.RECIPES:
        recipe, *options = line.format(folder="out").split()
        assert (ROOT / "recipes" / f"{recipe}.py").exists()
        assert "--data.path" not in options or options[options.index("--data.path") + 1] == "out/jpeg"


def test_small_shapes_run_every_operation():
    from benchmarks import small_shapes

    small_shapes.main(["--device", "cpu"])


@pytest.mark.slow
def test_dry_run(tmp_path):
    """All phases, at toy sizes; the other benchmark files run in tests/benchmarks/test_benchmarks.py."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--out", str(tmp_path), "--only", "step"]
    # pytest-benchmark measures nothing where it believes to run in a worker of pytest-xdist, as this test may
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("_gpu_check_step_dry_run")
    found = read(path)
    kinds = {group.split(":")[0].split(",")[0] for group in found.groups()}
    assert kinds == {"pre-training", "options of our own step", "backbone", "optimizer step with clipping"}
    assert len(found.groups()) == 10
    assert {"beit_fast", "timm", "transformers, SDPA", "official style"} <= {row.name for row in found.rows}
    tail = done.stdout[-6000:]
    assert "nothing above says anything about a GPU" in tail
    for phase in ("GPU tests          ok", "benchmarks         ok", "projection: 800 epochs"):
        assert phase in tail
