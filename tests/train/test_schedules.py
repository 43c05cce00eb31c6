"""Learning rates against the official code's arrays."""

import numpy as np
import pytest

from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.schedules import learning_rate, run_length

PAPER = OptimConfig()
IMAGENET = 1_281_167


def official_array(base, final, epochs, steps_per_epoch, warmup_epochs):
    """The schedule as the official code tabulates it, written from its description."""
    warmup = warmup_epochs * steps_per_epoch
    rest = np.arange(epochs * steps_per_epoch - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))
    return np.concatenate([np.linspace(0, base, warmup), cosine])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 2.400384e-7),
        (6249, 1.5e-3),
        (6250, 1.5e-3),
        (187_500, 1.0571163640e-3),
        (499_999, 1.0000000015e-5),
    ],
)
def test_golden_rates_of_800_epochs(step, expected):
    assert learning_rate(step, PAPER, 500_000, 6250) == pytest.approx(expected, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(7, 2), (5, 0), (3, 1)])
def test_equals_the_tabulated_schedule(epochs, warmup_epochs):
    table = official_array(1.5e-3, 1e-5, epochs, 11, warmup_epochs)
    closed = [learning_rate(s, PAPER, epochs * 11, warmup_epochs * 11) for s in range(epochs * 11)]
    np.testing.assert_allclose(closed, table, rtol=1e-12, atol=1e-18)


def test_poly_is_mmsegmentations():
    """Written from its description: a line from the base rate to the least, times a factor in the warm-up."""
    base, least, ratio, warmup, total = 7e-4, 0.0, 1e-6, 1500, 160_000
    config = OptimConfig(lr=base, min_lr=least, warmup_lr=base * ratio, schedule="poly")
    steps = np.arange(0, total, 37)
    line = (base - least) * (1 - steps / total) + least
    missing = np.clip(1 - steps / warmup, 0, None) * (1 - ratio)
    found = [learning_rate(int(step), config, total, warmup) for step in steps]
    np.testing.assert_allclose(found, line * (1 - missing), rtol=1e-12)
    assert learning_rate(0, config, total, warmup) == pytest.approx(7e-10)
    assert learning_rate(total, config, total, warmup) == 0.0


def test_run_length_of_imagenet():
    assert run_length(RunConfig(), IMAGENET) == (625, 500_000, 6250)
    assert run_length(RunConfig(epochs=150, optim=OptimConfig(warmup_steps=10_000)), 14_197_122) == (
        6932,
        1_039_800,
        10_000,
    )


def test_linear_and_constant():
    linear = OptimConfig(lr=1.0, min_lr=0.0, schedule="linear")
    assert [learning_rate(s, linear, 6, 2) for s in range(6)] == [0, 1, 1, 0.75, 0.5, 0.25]
    constant = OptimConfig(lr=0.5, schedule="constant")
    assert {learning_rate(s, constant, 9, 0) for s in range(9)} == {0.5}


@pytest.mark.parametrize(
    ("config", "samples", "message"),
    [
        (RunConfig(batch_size=8), 7, "lower --batch-size"),
        (RunConfig(batch_size=8, epochs=1, optim=OptimConfig(warmup_steps=11)), 80, "warm-up"),
        (RunConfig(batch_size=8, epochs=0, optim=OptimConfig(warmup_steps=0)), 80, "--epochs"),
    ],
)
def test_impossible_lengths(config, samples, message):
    with pytest.raises(ValueError, match=message):
        run_length(config, samples)


@pytest.mark.parametrize(("epochs", "expected"), [(20.0, 100), (10.0, 100), (9.9, 9), (0.5, 0)])
def test_a_short_run_has_a_short_warm_up(epochs, expected):
    """Ten epochs of warm-up in a run that is shorter: a tenth of the run, in place of a refusal."""
    config = RunConfig(epochs=epochs, batch_size=8, optim=OptimConfig(warmup_epochs=10.0))
    assert run_length(config, 80)[2] == expected
