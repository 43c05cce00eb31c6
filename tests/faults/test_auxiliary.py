"""R18, R19: what only accompanies a run cannot end it, and signals end it in time wherever they come."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from beit_fast.train import engine, metrics, progress
from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.distributed import watchdog
from beit_fast.visualize import run_report

TINY = Path(__file__).parents[1] / "train" / "tiny_task.py"
STEPS = ("--steps", 12, "--eval-every", 3)


@pytest.fixture
def undisturbed(tiny, tmp_path, weights):
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "whole", eval_every=3)
    engine.run(tiny.TinyTask(config))
    return weights(config.output_dir)


def full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")


def failing_once(function, at):
    """`function`, but full_disk at its `at`-th call."""
    calls = 0

    def wrapper(*arguments, **options):
        nonlocal calls
        calls += 1
        return full_disk() if calls == at else function(*arguments, **options)

    return wrapper


PLACES = {
    "metrics": (metrics.MetricsFile, "write"),
    "the files of metrics": (metrics.MetricsFile, "__init__"),
    "environment.json": (RunFolder, "record_start"),
    "progress": (progress.Progress, "interval"),
    "the bar": (progress.Progress, "advance"),
    "messages": (progress.Progress, "log"),
    "a replay": (RunFolder, "keep_for_replay"),
    "the report": (run_report, "write_report"),
}


@pytest.mark.parametrize("name", PLACES)
def test_r18_an_auxiliary_failure_costs_no_step(
    tiny, tmp_path, monkeypatch, weights, undisturbed, capsys, outcome, name
):
    """A full disk at the first, third and every call: same weights, exit code 0, a line per kind on stderr."""
    passed, longest = 0, 0.0
    owner, attribute = PLACES[name]
    real = getattr(owner, attribute)
    bad = (5,) if name == "a replay" else ()
    for number, broken in enumerate((failing_once(real, 1), failing_once(real, 3), full_disk)):
        config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / str(number), eval_every=3, bad_steps=bad)
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, broken)
            began = time.monotonic()
            result = engine.run(tiny.TinyTask(config))
        longest = max(longest, time.monotonic() - began)
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        same = bad or weights(config.output_dir) == undisturbed
        passed += (result.exit_code, result.step) == (0, 12) and bool(same) and len(warnings) <= 3
        if broken is full_disk:
            assert warnings
    outcome("R18", f"{name} cannot be written, at the first, third or every call", 3, passed, "no step lost",
            cost=(0, longest, 0))  # fmt: skip


@pytest.mark.parametrize("step", [3, 6, 9])
def test_r18_an_evaluation_that_fails_costs_no_step(tiny, tmp_path, weights, undisturbed, outcome, step):
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", eval_every=3, bad_evaluation=step)
    began = time.monotonic()
    result = engine.run(tiny.TinyTask(config))
    passed = (result.exit_code, result.step) == (0, 12) and weights(config.output_dir) == undisturbed
    outcome("R18", "an evaluation before the last fails", 1, int(passed), "no step lost",
            cost=(0, time.monotonic() - began, 0))  # fmt: skip


def test_r18_a_last_evaluation_that_fails_is_repeated(tiny, tmp_path, weights, undisturbed):
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", bad_evaluation=12, eval_every=3)
    with pytest.raises(FileNotFoundError, match="vanished"):
        engine.run(tiny.TinyTask(config))
    assert weights(config.output_dir) == undisturbed
    result = engine.run(tiny.TinyTask(dataclasses.replace(config, bad_evaluation=None)))
    assert (result.exit_code, result.step) == (0, 12)
    assert "held_out_loss" in result.metrics


def is_complete(folder):
    saved = [path.name for path in list_checkpoints(folder / "checkpoints")]
    return saved[-1:] == ["step_00000012"] and (folder / "complete.json").exists()


OUTPUT = "an output without a reader, on a full disk, or closed"


@pytest.mark.parametrize("redirection", ["| head -n 1", pytest.param(">&- 2>&-", marks=pytest.mark.slow)])
def test_r18_an_output_that_cannot_be_written_costs_no_step(tmp_path, environment, redirection, outcome):
    command = f"{sys.executable} {TINY} --output-dir {tmp_path / 'run'} --device cpu {redirection}"
    began = time.monotonic()
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, timeout=120)
    passed = done.returncode == 0 and is_complete(tmp_path / "run")
    outcome("R18", OUTPUT, 1, int(passed), "no step lost", cost=(0, time.monotonic() - began, 0))


@pytest.mark.parametrize("outputs", [["/dev/full"], [None], ["/dev/full", "/dev/full"], [None, None]], ids=str)
def test_r18_outputs_that_cannot_be_written_cost_no_step(ranks, tmp_path, outputs, outcome):
    """stdout, or stdout and stderr, on a full device or closed: as above, in a forked process."""
    done = ranks.run(tmp_path / "run", 1, outputs=outputs)
    passed = done.code == 0 and is_complete(tmp_path / "run")
    outcome("R18", OUTPUT, 1, int(passed), "no step lost", cost=(0, done.seconds, 0))


def test_what_ends_a_run_saves_first(tiny, tmp_path, monkeypatch):
    """An error between two checkpoints: the step before it is on the disk."""
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run")

    class Breaks(tiny.TinyTask):
        def prepare(self, batch, step):
            if step == 8:
                raise OSError("the network share is gone")
            return super().prepare(batch, step)

    with pytest.raises(OSError, match="network share"):
        engine.run(Breaks(config))
    assert [path.name for path in list_checkpoints(config.output_dir / "checkpoints")][-1] == "step_00000008"


def signalled(ranks, folder, number, at, limit_s=5):
    """Signal a run after `at` seconds; its outcome, and whether it ended within the limit with nothing lost."""
    arguments = (*STEPS, "--step-s", 0.05, "--slow-s", 0.6, "--checkpoint.every-steps", 100)
    done = ranks.run(folder, 1, *arguments, signal_tree=[number, at])
    saved = [path.name for path in list_checkpoints(folder / "checkpoints")]
    in_time = done.seconds - at < limit_s and not done.hung
    began = any(line.startswith("tiny: step ") for line in done.log.splitlines())
    at_work = began and not (folder / "complete.json").exists()  # a signal saves: it must not be what ends the process
    ended = done.code in ((0, 75) if at_work else (0, 75, -number, 128 + number))
    logged = [line for line in done.log.splitlines() if line.startswith("stopped by a signal: saved step ")]
    step = int(logged[0].split("saved step ")[1].split(";")[0]) if logged else None
    kept = step is None or f"step_{step:08d}" in saved
    return done, in_time and ended and kept


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 0.4), (signal.SIGINT, 0.9), (signal.SIGHUP, 2.4)])
def test_a_signal_ends_a_run_in_time(ranks, tmp_path, number, at):
    """Long before the run would end by itself; that 5 seconds suffice is a matter of R19, on a quiet machine."""
    done, passed = signalled(ranks, tmp_path / "run", number, at, limit_s=200)
    assert passed, done
    assert done.code != 0


SLOW_PARTS = {"build": 0, "batches": 0, "evaluate": 3, "finish": 12}
"""Part of a task that may take long, and the step that is saved where a run ends in it for the first time."""


def slow_at(tiny, place, act):
    """The tiny task that calls `act` in one of its slow parts, the first time that it comes there."""

    def once():
        nonlocal act
        first, act = act, lambda: None
        first()

    def part(task, *arguments):
        once()
        return getattr(tiny.TinyTask, place)(task, *arguments)

    def batches(task, requests):
        for batch in tiny.TinyTask.batches(task, requests):
            once()
            yield batch

    return type("Slow", (tiny.TinyTask,), {place: batches if place == "batches" else part})


@pytest.mark.parametrize("place", SLOW_PARTS)
def test_a_signal_is_not_left_until_a_slow_part_is_over(tiny, tmp_path, place):
    """SIGHUP while a model is built, images are drawn, an evaluation runs or artefacts are written."""
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", eval_every=3)
    went_on = []

    def hung_up():
        os.kill(os.getpid(), signal.SIGHUP)
        went_on.append(place)

    result = engine.run(slow_at(tiny, place, hung_up)(config))
    assert (result.exit_code, result.step, went_on) == (engine.EXIT_RESUME, SLOW_PARTS[place], [])
    saved = [path.name for path in list_checkpoints(config.output_dir / "checkpoints")]
    assert saved[-1:] == ([f"step_{result.step:08d}"] if result.step else [])
    assert engine.run(tiny.TinyTask(config)).step == 12
    assert is_complete(config.output_dir)


@pytest.mark.parametrize("place", SLOW_PARTS)
def test_the_watchdog_covers_the_slow_parts(tiny, tmp_path, monkeypatch, place):
    """Before the first step, in an evaluation and at the end a task stands still until the watchdog says so."""
    reports, reported = [], threading.Event()

    def end(dog):
        reports.append(dog.describe())
        reported.set()

    def stand_still():
        reported.clear()
        reported.wait(20)
        reports.append("here")

    monkeypatch.setattr(watchdog, "TICK_S", 0.02)
    monkeypatch.setattr(watchdog, "SLOW_S", 0.3)
    monkeypatch.setattr(watchdog.Watchdog, "_end", end)
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", eval_every=3, hang_timeout_s=0.3)
    engine.run(slow_at(tiny, place, stand_still)(config))
    phase = {"build": "starting", "batches": "waiting for data", "evaluate": "evaluating", "finish": "finishing"}[place]
    said = f"rank 0 of 1 stands still, {phase}, {SLOW_PARTS[place]} steps done"
    assert said in reports[: reports.index("here")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_r19_thirty_signals_from_the_start_to_the_exit(ranks, tmp_path, outcome, number):
    moments = [0.05 + 0.13 * part for part in range(30)]
    ends = [signalled(ranks, tmp_path / str(part), number, at) for part, at in enumerate(moments)]
    longest = max(done.seconds - at for (done, _), at in zip(ends, moments, strict=True))
    outcome("R19", f"{number.name} at 30 moments from the start to the exit", 30, sum(passed for _, passed in ends),
            "saved or nothing to save, at most 5 s", cost=(0, longest, 0))  # fmt: skip
