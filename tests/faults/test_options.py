"""R14: whatever is typed, a run or one line."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 70), st.floats(allow_nan=True, width=32), st.sampled_from(["", "x", "1e400", "--", "0"])
)
NAMES = st.sampled_from(
    ["--steps", "--batch-size", "--batch-per-device", "--seed", "--optim.lr", "--optim.min-lr", "--optim.warmup-steps",
     "--optim.warmup-epochs", "--optim.weight-decay", "--optim.clip-grad", "--optim.ema-decay", "--optim.eps",
     "--optim.betas", "--optim.schedule", "--checkpoint.keep", "--checkpoint.every-steps", "--checkpoint.background",
     "--log.every-steps", "--log.progress", "--precision", "--device", "--parallel", "--hang-timeout-s", "--max-steps",
     "--eval-every", "--epochs", "--fresh", "--replay", "--gpus", "--compile", "--width", "--samples", "--dry-run",
     "--zzz", "--optim", "--lr", "surplus"]
)  # fmt: skip


def one_line_or_a_run(tiny, folder, arguments, capsys):
    from beit_fast.train.cli import main

    recipe = dataclasses.replace(tiny.RECIPE, steps=2, output_dir=folder)
    with pytest.raises(SystemExit) as stop:
        main(recipe, tiny.TinyTask, arguments=arguments)
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    if stop.value.code in (None, 0, 75):
        return
    assert stop.value.code in (1, 2)
    errors = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, out.err
    assert len(errors[0]) > len("error: "), out.err


@pytest.fixture(scope="module")
def tiny():
    import importlib.util
    import sys
    from pathlib import Path

    path = Path(__file__).parents[1] / "train" / "tiny_task.py"
    spec = importlib.util.spec_from_file_location("tiny_task_options", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_task_options"] = module
    spec.loader.exec_module(module)
    return module


def fuzz(tiny, tmp_path_factory, capsys, monkeypatch, examples):
    from beit_fast.train import launch

    monkeypatch.setattr(launch, "launch", lambda count, device: 0)  # no processes: options are what is tested
    tried = 0

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(st.tuples(NAMES, NUMBERS), min_size=1, max_size=3))
    def attempt(options):
        nonlocal tried
        tried += 1
        arguments = [text for name, value in options for text in (name, str(value))]
        one_line_or_a_run(tiny, tmp_path_factory.mktemp("run") / "run", arguments, capsys)

    attempt()
    return tried


def test_options(tiny, tmp_path_factory, capsys, monkeypatch):
    fuzz(tiny, tmp_path_factory, capsys, monkeypatch, 25)


@pytest.mark.slow
def test_many_options(tiny, tmp_path_factory, capsys, monkeypatch, outcome):
    tried = fuzz(tiny, tmp_path_factory, capsys, monkeypatch, 500)
    outcome("R14", "random options and values: a run, or one line that says what is wrong", tried, tried, "all")
