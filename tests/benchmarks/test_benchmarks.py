"""The benchmarks measure what they say: interleaved rounds, results compared before timing, baselines of equal work."""

import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from benchmarks import machine
from benchmarks.baselines.official_style import TECHNIQUES, OfficialStep, OfficialStyle, trainable
from benchmarks.clocks import RecordedClock, kernels_among
from benchmarks.conftest import Scale
from benchmarks.harness import (
    OURS,
    Comparison,
    Disagreement,
    Implementation,
    Unavailable,
    interval_rank,
    measure_interleaved,
    ratio_of,
)
from benchmarks.memory import PeakMemory
from benchmarks.records import read

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def comparison(**implementations):
    return Comparison("a group", implementations, {"B": 1})


def sleeping(seconds, **values):
    result = (lambda: {name: torch.tensor(value) for name, value in values.items()}) if values else None
    return lambda: Implementation(lambda: time.sleep(seconds), result)


def test_rounds_are_interleaved_and_the_ratio_is_that_of_a_round():
    order = []
    ways = {name: lambda name=name: Implementation(lambda: order.append(name)) for name in (OURS, "other")}
    case = Comparison("g", ways, {})
    measured = measure_interleaved(case, CPU, pairs=12, most_pairs=12, call_s=1e-9)
    rounds = [tuple(order[-2 * i - 2 :][:2]) for i in range(12)]
    assert set(rounds) == {(OURS, "other"), ("other", OURS)}  # once each, and who goes first changes
    assert {len(times) for times in measured.seconds.values()} == {12}
    assert ratio_of([3.0, 8.0, 2.0], [1.0, 2.0, 2.0]) == (3.0, 1.0, 4.0, 3)


def test_the_interval_holds_the_median_in_95_of_100_trials():
    torch.manual_seed(0)
    for count in (7, 15, 31):
        rank = interval_rank(count)
        values = torch.randn(20_000, count).sort(1).values
        held = ((values[:, rank] <= 0) & (values[:, count - 1 - rank] >= 0)).double().mean()
        tighter = ((values[:, rank + 1] <= 0) & (values[:, count - 2 - rank] >= 0)).double().mean()
        assert held > 0.945
        assert tighter < 0.955


def test_a_baseline_that_computes_something_else_is_not_timed():
    slow = sleeping(10.0, loss=2.0)
    with pytest.raises(Disagreement, match="other computes something else: loss differs by 1"):
        measure_interleaved(comparison(beit_fast=sleeping(10.0, loss=1.0), other=slow), CPU)
    with pytest.raises(Disagreement, match="loss"):
        measure_interleaved(comparison(beit_fast=sleeping(0.0, loss=1.0), other=sleeping(0.0, loss=float("nan"))), CPU)


def test_in_half_precision_errors_against_fp64_are_judged_by_those_of_plain_operations():
    exact, eager = {"loss": torch.tensor(1.0)}, {"loss": torch.tensor(1.02)}

    def measured(ours, theirs):
        ways = {"beit_fast": sleeping(0.0, loss=ours), "other": sleeping(0.0, loss=theirs)}
        case = Comparison("g", ways, {}, dtype="bfloat16", exact=lambda: (exact, eager))
        return measure_interleaved(case, CPU, pairs=2, most_pairs=2, call_s=1e-9).errors

    assert measured(1.023, 1.05)["beit_fast"]["loss"] == pytest.approx(0.023, rel=1e-3)
    with pytest.raises(Disagreement, match=r"beit_fast .* loss is 2\.50e-02 from fp64, .* bfloat16 are 2\.00e-02"):
        measured(1.025, 1.0)
    with pytest.raises(Disagreement, match="other computes something else"):
        measured(1.0, 1.07)
    eager["loss"] = torch.tensor(1.0)  # below the floor no error is judged
    assert measured(1.0019, 1.0019)
    with pytest.raises(Disagreement):
        measured(1.0, 1.0021)


def test_an_unavailable_baseline_is_named_with_its_reason():
    def absent():
        raise Unavailable("no such library")

    def missing():
        import a_package_that_does_not_exist  # noqa: F401

    measured = measure_interleaved(
        comparison(beit_fast=sleeping(0.0), one=absent, two=missing), CPU, pairs=2, most_pairs=2, call_s=1e-9
    )
    assert measured.unavailable == {"one": "no such library", "two": "No module named 'a_package_that_does_not_exist'"}
    assert list(measured.seconds) == [OURS]


def test_a_baseline_that_fails_is_left_out_but_our_own_failure_is_an_error():
    def failing():
        raise RuntimeError("no kernel image\nmore lines")

    def fails_later():
        return Implementation(lambda: None, failing)

    fine = sleeping(0.0, loss=1.0)
    rounds = {"pairs": 2, "most_pairs": 2, "call_s": 1e-9}
    measured = measure_interleaved(comparison(beit_fast=fine, one=failing, two=fails_later), CPU, **rounds)
    assert measured.unavailable == dict.fromkeys(("one", "two"), "fails here: RuntimeError: no kernel image")
    assert list(measured.seconds) == [OURS]
    with pytest.raises(RuntimeError, match="no kernel image"):
        measure_interleaved(comparison(beit_fast=failing, one=fine), CPU)


def test_the_report_carries_work_over_time_and_conditions():
    case = Comparison("g", {OURS: sleeping(0.01)}, {"B": 4, "grid": (2, 3)}, flops=2e7, bytes=1e7, images=4)
    measured = measure_interleaved(case, CPU, pairs=2, most_pairs=2, call_s=0.0)
    row = measured.report(OURS)
    assert row["gflop_per_s"] == pytest.approx(0.02 / statistics.median(measured.seconds[OURS]))
    assert row["gflop_per_s"] <= 2.01
    assert row["gb_per_s"] == pytest.approx(row["gflop_per_s"] / 2)
    assert row["images_per_s"] == pytest.approx(row["gflop_per_s"] * 200)
    assert 0 < row["share_of_matmul"] < 1
    assert 0 < row["share_of_copy"] < 1
    assert row["grid"] == [2, 3]
    assert row["threads"] == torch.get_num_threads()
    assert row["over_beit_fast"]["median"] == 1


def test_peak_memory_is_that_of_the_code_inside():
    with PeakMemory(CPU) as peak:
        kept = torch.ones(48 << 18)  # 48 MiB
        (kept + 1).sum()
    assert peak.mib == pytest.approx(96, abs=8)


def test_recorded_times_reach_the_timer_unchanged():
    clock = RecordedClock()
    assert clock.load([0.5, 0.25]) == 2
    seen = []
    for _ in range(2):
        start = clock()
        clock.next_round()
        seen.append(clock() - start)
    assert seen == [0.5, 0.25]


def masked_model(preset):
    torch.manual_seed(0)
    config = BeitConfig.from_preset(
        "tiny", preset, depth=3, width=48, num_heads=3, image_size=32, patch_size=8, vocab_size=60, init_std=0.2
    )
    model = BeitForMaskedImageModeling(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "table" in name:
                parameter.normal_(std=0.3)
    mask = torch.rand(2, 16) < 0.4
    return config, model, torch.randn(2, 3, 32, 32), mask, torch.randint(0, 60, (int(mask.sum()),))


@pytest.mark.parametrize("preset", ["plus", "plain"])
def test_every_technique_alone_and_all_together_give_the_models_gradients(preset):
    config, model, images, mask, labels = masked_model(preset)
    output = model(images, mask, labels)
    output.loss.backward()
    for techniques in ((), *((name,) for name in TECHNIQUES), tuple(TECHNIQUES)):
        weights = trainable(model.state_dict())
        step = OfficialStep(OfficialStyle(config, weights, techniques))
        loss, correct = step.forward_backward(images, mask, labels)
        torch.testing.assert_close(loss, output.loss.detach())
        assert correct == output.num_correct
        for name, parameter in model.named_parameters():
            error = (weights[name].grad - parameter.grad).norm() / parameter.grad.norm()
            assert error < 5e-6, (techniques, name)


def test_the_step_of_the_official_style_moves_the_weights_as_adamw_does():
    config, model, images, mask, labels = masked_model("plus")
    moved = {}
    for techniques in ((), ("optimizer",), ("no_sync",)):
        weights = trainable(model.state_dict())
        step = OfficialStep(OfficialStyle(config, weights, techniques), learning_rate=1e-3, clip=0.5)
        loss, accuracy = step(images, mask, labels)
        assert isinstance(loss, torch.Tensor if "no_sync" in techniques else float)
        assert 0 <= float(accuracy) <= 1
        moved[techniques] = weights
    for name, tensor in moved[()].items():
        assert not torch.equal(tensor, model.state_dict()[name])
        torch.testing.assert_close(moved[("optimizer",)][name], tensor, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(moved[("no_sync",)][name], tensor)


def test_kernels_are_counted_without_copies_fills_and_named_ranges():
    def event(name, on_gpu=True, named=False):
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=named)

    kernels = [event("gelu_kernel"), event("gelu_kernel"), event("sm90_xmma_gemm")]
    others = [event("aten::gelu", on_gpu=False), event("Memcpy HtoD (Pinned -> Device)"), event("Memset (Device)"),
              event("Optimizer.step#AdamW.step", named=True)]  # fmt: skip
    assert kernels_among([*others, *kernels]) == 3


def test_cpu_time_counts_work_not_waiting():
    def working():
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    script = "import time\nfor _ in open(0):\n until = time.thread_time() + 0.1\n"
    script += " while time.thread_time() < until: pass\n print('', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def asking():
            print(file=child.stdin, flush=True)
            child.stdout.readline()

        ways = {OURS: lambda: Implementation(working), "waiting": lambda: Implementation(lambda: time.sleep(0.1)),
                "a child": lambda: Implementation(asking)}  # fmt: skip
        case = Comparison("g", ways, {}, clock="cpu")
        measured = measure_interleaved(case, CPU, pairs=2, most_pairs=2, call_s=0.0)
        child.stdin.close()
    assert min(measured.seconds[OURS]) > 0.04
    assert max(measured.seconds["waiting"]) < 0.04
    assert min(measured.seconds["a child"]) > 0.07  # counted in hundredths


@pytest.mark.slow
def test_every_benchmark_runs_at_toy_sizes_beside_at_least_five_baselines(tmp_path):
    path = tmp_path / "2026-11-21_box_all.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--tiny", "--stop-after", "inf"]
    command += ["--bench-device", "cpu", "--benchmark-json", str(path), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = read(path)
    measured = {row.name for row in found.rows}
    baselines = {"timm", "transformers, SDPA", "torch fused", "safetensors", "plain Python", "Pillow, official order"}
    assert baselines <= measured
    files = {Path(entry["fullname"].split("::")[0]).name for entry in json.loads(path.read_text())["benchmarks"]}
    assert files == {file.name for file in (ROOT / "benchmarks").glob("bench_*.py")}
    for row in found.rows:
        assert row.info["device"] == "cpu", row.key
        assert row.info["threads"] >= 1
    assert found.environment["versions"]["torch"] == torch.__version__
    assert "pytest benchmarks/ --benchmark-only --tiny" in found.command
    assert "times as long as beit_fast: median of the rounds and its 95 % interval" in done.stdout


@dataclasses.dataclass(frozen=True)
class HalfPrecision(Scale):
    """Toy sizes on a CPU in bf16, as a GPU has them."""

    dtype = "bfloat16"


SLOW = (
    "attention",
    "backbone",
    "drop_in",
    "gelu",
    "mim_loss",
    "residual",
    "segmentation",
    "step_options",
    "mim_step",
    "token_cache",
)  # many cases, or compiled ones


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_in_bf16_everyone_is_within_the_relation_to_fp64(name, tmp_path_factory):
    module = importlib.import_module(f"benchmarks.bench_{name}")
    cases = module.cases(HalfPrecision("tiny", CPU)).values()
    if name == "mim_step":
        comparisons = [make(case) for case in cases for make in (module.forward_backward, module.whole_step)]
    else:
        folders = [tmp_path_factory.mktemp("tokens")] if name == "token_cache" else []
        comparisons = [module.compare(case, *folders) for case in cases]
    for comparison in comparisons:
        assert comparison.dtype == "bfloat16"
        measured = measure_interleaved(comparison, CPU, pairs=1, most_pairs=1, call_s=1e-9)
        assert OURS in measured.errors
        assert len(measured.errors) > 1


def test_a_record_names_no_folder_of_the_machine(monkeypatch):
    words = ["/a/b/other_checkout.py", "/home/me/base", "--json=/tmp/x.json", "records/y.json", "-k", "a or b", "/"]
    monkeypatch.setattr(sys, "argv", words)
    assert machine.command() == "other_checkout.py base --json=x.json records/y.json -k 'a or b' ''"
