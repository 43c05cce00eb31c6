"""Continuing a run otherwise: to another length, with another batch size; its best checkpoint, and an early end."""

import dataclasses
import json

import pytest
import torch

from beit_fast.train import engine
from beit_fast.train.checkpoint.format import list_checkpoints, verify
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.continuation import BestEvaluation
from beit_fast.train.metrics import read_metrics
from beit_fast.train.schedules import RunSchedule, learning_rate


@pytest.fixture
def train(tiny, tmp_path):
    """`train("name", **changes)` runs the tiny recipe (12 steps of 8, 40 samples) in folder `name`."""

    def run(name, evaluations=None, **changes):
        class Scripted(tiny.TinyTask):
            def evaluate(self, model, step):
                return super().evaluate(model, step) if evaluations is None else {"top1_percent": evaluations[step]}

        config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / name, **changes)
        task = Scripted(config)
        return engine.run(task), config.output_dir, task

    return run


def rates(folder):
    return {line["step"]: line["lr"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"}


def test_a_finished_run_is_extended_along_the_longer_schedule(train, tiny):
    short, folder, _ = train("run")
    result, _, task = train("run", steps=20, extend=True)
    assert (short.step, result.step) == (12, 20)
    assert task.seen[0] == (2, [16, 17, 18, 19, 20, 21, 22, 23])  # step 12 of 5 per epoch
    found = rates(folder)
    optim = tiny.RECIPE.optim
    assert found[12] == learning_rate(11, optim, 12, 2)
    assert found[14] == learning_rate(13, optim, 20, 2) > found[12]
    again, _, task = train("run", steps=20, extend=True)  # the same command has nothing left to do
    assert (again.step, task.seen) == (20, [])
    with pytest.raises(ValueError, match=r"steps: 20 in that run, 24 now.*; --extend continues it so; or repeat"):
        train("run", steps=24)


def test_an_extension_that_is_killed_goes_on(train, weights):
    train("run")
    train("run", steps=20, extend=True, max_steps=15)
    result, broken, _ = train("run", steps=20, extend=True)
    train("whole")
    _, whole, _ = train("whole", steps=20, extend=True)
    assert result.step == 20
    assert weights(broken) == weights(whole)


def test_the_batch_size_is_changed_at_the_same_place(train, tiny):
    """Lengths in epochs: 20 epochs of 40 samples in batches of 4, from the middle on in batches of 8."""
    options = {"steps": None, "epochs": 4.0, "log": LogConfig(every_steps=1, progress="none")}
    train("run", batch_size=4, max_steps=20, **options)
    with pytest.raises(ValueError, match=r"batch_size: 4 in that run, 8 now.*--change-batch-size continues it so"):
        train("run", batch_size=8, **options)
    result, folder, task = train("run", batch_size=8, change_batch_size=True, **options)
    assert result.step == 20 + 10  # two epochs are left: ten steps of 8
    assert [positions for epoch, positions in task.seen if epoch == 2] == [
        list(range(start, start + 8)) for start in range(0, 40, 8)
    ]
    lines = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"}
    assert (lines[20]["epoch"], lines[21]["epoch"], lines[30]["epoch"]) == (2.0, 2.2, 4.0)
    assert (lines[20]["samples_seen"], lines[21]["samples_seen"]) == (80, 88)
    optim = tiny.RECIPE.optim
    assert lines[20]["lr"] == learning_rate(19, optim, 40, 4)
    assert lines[21]["lr"] == learning_rate(10, optim, 20, 2) == pytest.approx(learning_rate(20, optim, 40, 4))
    once_more, _, task = train("run", batch_size=8, change_batch_size=True, **options)
    assert (once_more.step, task.seen) == (30, [])


def test_changing_the_batch_size_and_stopping_costs_no_bit(train, weights):
    options = {"steps": None, "epochs": 4.0, "dropout": 0.2}
    for name in ("whole", "broken"):
        train(name, batch_size=4, max_steps=15, **options)
    _, whole, _ = train("whole", batch_size=8, change_batch_size=True, **options)
    train("broken", batch_size=8, change_batch_size=True, max_steps=19, **options)
    _, broken, _ = train("broken", batch_size=8, change_batch_size=True, **options)
    assert weights(whole) == weights(broken)


@pytest.mark.parametrize(
    ("steps", "before", "now", "step", "offsets"),
    [
        (None, 8, 8, 7, (0, 0)),
        (None, 8, 16, 9, (-5, -5)),  # 9 of 5 per epoch is 1.8 epochs, 3.6 steps of 2 per epoch, rounded 4
        (None, 16, 8, 4, (6, 6)),  # 4 of 2 per epoch is 2 epochs, 10 steps of 8
        (100, 16, 8, 4, (0, 6)),  # a length in steps: the schedule keeps its steps
    ],
)
def test_offsets(tiny, steps, before, now, step, offsets):
    config = dataclasses.replace(tiny.RECIPE, steps=steps, epochs=30.0, batch_size=now, change_batch_size=True)
    found = RunSchedule.after(config, 40, step, {"batch_size": before})
    assert (found.schedule_offset, found.data_offset) == offsets


def test_a_checkpoint_of_an_earlier_version_does_not_know_its_batch_size(tiny):
    config = dataclasses.replace(tiny.RECIPE, change_batch_size=True)
    with pytest.raises(ValueError, match="with its own --batch-size first"):
        RunSchedule.after(config, 40, 3, {})
    assert RunSchedule.after(tiny.RECIPE, 40, 3, {}).data_offset == 0


SCORES = {3: 10.0, 6: 30.0, 9: 20.0, 12: 25.0, 15: 29.0}
BEST = {"checkpoint": CheckpointConfig(every_steps=3, keep=2, best="top1_percent"), "eval_every": 3}


def test_the_best_checkpoint_outlives_the_newest_ones(train, weights):
    _, folder, _ = train("run", SCORES, steps=15, **BEST)
    best = folder / "best"
    assert json.loads((best / "best.json").read_text()) == {"step": 6, "top1_percent": 30.0}
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_00000012", "step_00000015"]
    (kept,) = list_checkpoints(best / "checkpoints")
    _, at_six, _ = train("six", SCORES, steps=15, max_steps=6, **BEST)
    newest = verify(list_checkpoints(at_six / "checkpoints")[-1])
    expected, found = dict(newest.tensors("model")), dict(verify(kept).tensors("model"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert json.loads((best / "model" / "sums.json").read_text()) == pytest.approx(
        {name: float(value.double().sum()) for name, value in found.items()}
    )
    assert json.loads((best / "config.json").read_text())["task"] == "tiny"
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".tmp", ".old"))]


def test_a_run_ends_where_nothing_is_gained_and_is_then_complete(train):
    result, folder, task = train("run", SCORES, steps=15, stop_after_no_gain=2, **BEST)
    assert result.step == 12  # the best was at 6; those of 9 and 12 are not better
    assert json.loads((folder / "complete.json").read_text())["early"] is True
    assert (folder / "model" / "sums.json").exists()
    again, _, task = train("run", SCORES, steps=15, stop_after_no_gain=2, **BEST)
    assert (again.step, task.seen) == (12, [])
    longer, _, _ = train("run", SCORES, steps=15, **BEST)  # without the option it goes on
    assert longer.step == 15


def test_an_early_end_that_is_interrupted_is_found_again(train):
    """Stopped after the evaluation of the step at which it would end: the evaluations are counted anew."""
    train("run", SCORES, steps=15, max_steps=12, **BEST)
    (result, folder, task) = train("run", SCORES, steps=15, stop_after_no_gain=2, **BEST)
    assert (result.step, task.seen) == (12, [])
    assert json.loads((folder / "best" / "best.json").read_text())["step"] == 6


def test_smaller_losses_are_better_and_nan_is_never(train):
    lines = [{"held_out_loss": value} for value in (2.0, float("nan"), 1.0, 1.5)]
    best = BestEvaluation("held_out_loss", lines)
    assert (best.value, best.without_gain) == (1.0, 1)
    assert not best.is_exhausted(2)
    assert best.is_exhausted(1)
    assert not best.is_exhausted(None)
    assert not BestEvaluation("top1_percent", [{"top1_percent": 3.0}]).add({"top1_percent": 3.0})


def test_a_metric_that_is_not_measured_is_named(train):
    wrong = {**BEST, "checkpoint": CheckpointConfig(every_steps=3, best="top1")}
    with pytest.raises(ValueError, match=r"--checkpoint.best top1: .* choose from top1_percent"):
        train("run", SCORES, steps=15, **wrong)


def test_an_early_end_needs_a_metric(tiny):
    with pytest.raises(ValueError, match=r"needs --checkpoint.best METRIC and --eval-every STEPS"):
        dataclasses.replace(tiny.RECIPE, stop_after_no_gain=2)


def test_learning_rates_may_change_with_either(train, tiny):
    train("run", max_steps=6)
    lower = OptimConfig(lr=5e-3, warmup_epochs=0.4)
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 in that run, 0.005 now.*--resume-from STEP continues it so"):
        train("run", optim=lower)
    result, _, _ = train("run", optim=lower, steps=14, extend=True)
    assert result.step == 14
