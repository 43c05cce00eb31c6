"""The loop: exact resume, independence of the split, skipped steps, precision, signals."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from beit_fast.train import engine
from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.config import LogConfig, OptimConfig
from beit_fast.train.distributed.world import StopSignal, World
from beit_fast.train.metrics import read_metrics
from beit_fast.train.schedules import requests_of

CLOCK = ("samples_per_s", "step_ms", "data_wait_share", "peak_memory_mib")


@pytest.fixture
def train(tiny, tmp_path):
    """`train("name", **changes)` runs the tiny recipe in folder `name`; returns (result, folder, task)."""

    def run(name, **changes):
        config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / name, **changes)
        task = tiny.TinyTask(config)
        return engine.run(task), config.output_dir, task

    return run


def timeless(folder):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(folder / "metrics.jsonl")]


HARD = {"dropout": 0.2, "batch_per_device": 3, "optim": OptimConfig(lr=1e-2, warmup_epochs=0.4, ema_decay=0.9)}


def test_a_run_leaves_its_folder(train):
    result, folder, task = train("run")
    assert (result.exit_code, result.step) == (0, 12)
    assert task.closed
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "report.html"} <= names
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["kind"] == "evaluation"
    assert "<svg" in (folder / "report.html").read_text()
    start = json.loads((folder / "environment.json").read_text())["starts"][0]
    assert start["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_it_learns(train):
    _, folder, _ = train("run", steps=60, samples=400)
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("stop", [1, 5, 6])
def test_resume_is_bit_exact(train, weights, stop):
    """With dropout, averaged weights, accumulation, and a stop in the middle of an interval and of an epoch."""
    _, whole, _ = train("whole", **HARD)
    _, broken, _ = train("broken", max_steps=stop, **HARD)
    result, _, task = train("broken", **HARD)
    assert result.step == 12
    assert task.seen[0][0] == stop // 5
    assert weights(whole) == weights(broken)
    assert {name.split("/")[0] for name in weights(whole)[1]} == {"model", "optimizer", "ema"}
    # the first stop evaluates too; all other lines agree, those that span the interruption included
    broken_lines = [line for line in timeless(broken) if line["kind"] == "train" and line["step"] % 2 == 0]
    assert broken_lines == [line for line in timeless(whole) if line["kind"] == "train"]


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_kill_at_a_random_step_then_the_same_command(train, weights, program, tmp_path, kills):
    """kill -9 at some step, by the clock; the result is that of the unbroken run."""
    _, whole, _ = train("whole", steps=30)
    folder, seen = tmp_path / "killed", []
    for _ in range(kills):
        process = program(folder, "--steps", 30, "--step-s", 0.1, start=True)  # 2.5 s are left for the kill
        began = len(seen)
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step ") and len(seen) - began > 4:
                break
        time.sleep(random.random() / 10)
        process.kill()
        process.stdout.close()
        assert process.wait() == -9
    result, _, _ = train("killed", steps=30)
    assert result.step == 30
    assert kills == 1 or any("continuing" in line for line in seen)
    assert weights(folder) == weights(whole)
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == sorted(set(steps)), "a line was written twice"


KILLED_WHILE_SAVING = """
import dataclasses, importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("tiny_task", sys.argv[1])
tiny = importlib.util.module_from_spec(spec); sys.modules["tiny_task"] = tiny; spec.loader.exec_module(tiny)
from beit_fast.train import engine

def child(stop_at):
    calls, fsync = 0, os.fsync
    def dying(descriptor):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), 9)
        fsync(descriptor)
    os.fsync = dying
    config = dataclasses.replace(tiny.RECIPE, output_dir=Path(sys.argv[2]))
    engine.run(tiny.TinyTask(config))
    os._exit(0)

kills = 0
for stop_at in (6, 9, 5, 12, 8, 14, 10, 7, 10**9):
    pid = os.fork()
    if pid == 0:
        child(stop_at)
    status = os.waitpid(pid, 0)[1]
    kills += os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9
    if status == 0:
        break
print("KILLS", kills)
assert status == 0
"""


def test_kill_while_saving_then_the_same_command(train, tiny, weights, environment, tmp_path):
    """kill -9 between the writes of a save, again and again."""
    _, whole, _ = train("whole")
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, tiny.__file__, str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split("KILLS ")[1]) >= 3
    assert weights(tmp_path / "killed") == weights(whole)


def test_damaged_checkpoint_falls_back_and_says_so(train, weights, capsys):
    _, whole, _ = train("whole")
    _, folder, _ = train("broken", max_steps=6)
    newest = list_checkpoints(folder / "checkpoints")[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (newest / "model.safetensors").write_bytes(data)
    train("broken")
    text = capsys.readouterr().out
    assert "step_00000006 is damaged: model.safetensors does not match its crc32" in text
    assert "continuing from step_00000003" in text
    assert weights(folder) == weights(whole)


@pytest.mark.parametrize("per_device", [1, 3, 5])
def test_result_does_not_depend_on_the_split(train, weights, per_device):
    """Samples have one to four targets each: a mean per micro-batch would weigh them wrongly."""
    _, one, _ = train("one")
    _, split, _ = train("split", batch_per_device=per_device)
    (_, a), (_, b) = weights(one), weights(split)
    for name in a:
        x, y = (torch.frombuffer(bytearray(v), dtype=torch.float32) for v in (a[name], b[name]))
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)
    for x, y in zip(timeless(one), timeless(split), strict=True):
        assert x.keys() == y.keys()
        assert [x[k] for k in x if isinstance(x[k], float)] == pytest.approx(
            [y[k] for k in y if isinstance(y[k], float)], rel=1e-4
        )


def test_every_rank_and_split_sees_the_same_samples(tiny):
    for per_device in (8, 3):
        config = dataclasses.replace(tiny.RECIPE, batch_per_device=per_device)
        whole = list(requests_of(2, 7, 5, config, 0, 1))
        halves = [list(requests_of(2, 7, 5, config, rank, 2)) for rank in range(2)]
        for epoch in (0, 1):
            expected = [p for r in whole if r.epoch == epoch for p in r.positions]
            found = [p for requests in halves for r in requests if r.epoch == epoch for p in r.positions]
            assert sorted(found) == sorted(expected)
    assert [p for r in requests_of(0, 5, 5, config, 0, 1) for p in r.positions] == list(range(40))


def test_max_steps_does_not_bend_the_schedule(train):
    _, whole, _ = train("whole")
    _, short, _ = train("short", max_steps=6)
    rates = {line["step"]: line["lr"] for line in read_metrics(whole / "metrics.jsonl") if line["kind"] == "train"}
    lines = [line for line in read_metrics(short / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["lr"] == rates[line["step"]] for line in lines)


def test_finished_run_says_so(train, capsys):
    train("run")
    capsys.readouterr()
    result, _, task = train("run")
    text = capsys.readouterr().out
    assert result.exit_code == 0
    assert task.seen == []
    assert "complete at step 12" in text
    assert "--fresh" in text
    assert "--max-steps" in text


def test_non_finite_steps_are_skipped_and_counted(train, weights):
    _, folder, _ = train("run", bad_steps=(3, 4))
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 0, 0, 0]
    assert all(line["loss"] is not None for line in lines)
    counts = {name: v for name, v in weights(folder)[1].items() if name.endswith(".step")}
    assert {torch.frombuffer(bytearray(v), dtype=torch.float32).item() for v in counts.values()} == {10.0}


def test_persistent_non_finite_steps_end_the_run(train):
    optim = OptimConfig(lr=1e-2, warmup_epochs=0.4, max_skipped_steps=4)
    with pytest.raises(
        engine.PersistentNonFiniteGradients, match=r"in 5 steps in a row .*last checkpoint is step_00000006"
    ):
        train("run", bad_steps=tuple(range(3, 12)), optim=optim)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_on_the_cpu(train, weights, precision):
    """fp16: the scale starts too high on purpose; it falls, is logged, saved and restored."""
    _, whole, _ = train("whole", precision=precision, steps=24)
    train("broken", precision=precision, steps=24, max_steps=9)
    _, broken, _ = train("broken", precision=precision, steps=24)
    assert weights(whole) == weights(broken)
    state = json.loads((list_checkpoints(broken / "checkpoints")[-1] / "state.json").read_text())
    line = read_metrics(whole / "metrics.jsonl")[-2]
    if precision == "fp16":
        assert line["loss_scale"] == state["scaler"]["scale"] > 1
        assert state["scaler"]["clean_steps"] > 0
    losses = [x["loss"] for x in read_metrics(whole / "metrics.jsonl") if x["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_a_signal_saves_at_the_next_step(train, weights, capsys):
    before = signal.getsignal(signal.SIGTERM)
    _, whole, _ = train("whole")
    result, folder, _ = train("stopped", signal_at=6)
    assert (result.exit_code, result.step) == (75, 7)
    assert "the same command continues" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    train("stopped")
    assert weights(folder) == weights(whole)


def test_an_error_in_the_data_loses_no_step(train, tiny, weights, monkeypatch):
    """The steps since the last checkpoint are saved before the error goes up."""
    _, whole, _ = train("whole")
    batches = tiny.TinyTask.batches

    def failing(self, requests):
        for number, batch in enumerate(batches(self, requests)):
            if number == 5:
                raise ValueError("a shard is gone")
            yield batch

    monkeypatch.setattr(tiny.TinyTask, "batches", failing)
    with pytest.raises(ValueError, match="a shard is gone"):
        train("broken")
    monkeypatch.undo()
    _, folder, task = train("broken")
    assert task.seen[0] == (1, list(range(8)))
    assert weights(folder) == weights(whole)


def test_live_bar(train, capsys):
    """What the bar shows in 80 columns; it is drawn although this is no terminal."""
    train("run", log=LogConfig(every_steps=2, progress="bar"))
    text = capsys.readouterr().out
    assert "12/12" in text
    assert "samples/s" in text
    assert "wait" in text
    assert "ETA 0 s" in text
    assert "saved step_00000012" in text


def test_second_signal_ends_at_once():
    pid = os.fork()
    if pid == 0:
        StopSignal(World(0, 1, torch.device("cpu")))
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # an echo: launcher and scheduler both pass it on
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM


def test_averaged_weights_follow_their_definition(train, weights):
    """The average of a run of one step at decay 0.9: 0.9 initial + 0.1 final."""
    optim = OptimConfig(lr=1e-2, warmup_steps=0, ema_decay=0.9)
    _, folder, task = train("run", steps=1, optim=optim)
    torch.manual_seed(task.config.seed)
    initial = dict(task.build(World(0, 1, torch.device("cpu"))).named_parameters())
    saved = weights(folder)[1]
    for name, start in initial.items():
        final, average = (
            torch.frombuffer(bytearray(saved[f"{f}/{name}"]), dtype=torch.float32).view_as(start)
            for f in ("model", "ema")
        )
        torch.testing.assert_close(average, 0.9 * start.detach() + 0.1 * final)
