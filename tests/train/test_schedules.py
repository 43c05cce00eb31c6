"""Learning rates against the official code's arrays."""

import numpy as np
import pytest

from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.schedules import RunSchedule, accumulation, learning_rate, requests_of, run_length, seed_of

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
        (RunConfig(batch_size=8, epochs=0, optim=OptimConfig(warmup_steps=0)), 80, "--epochs"),
    ],
)
def test_impossible_lengths(config, samples, message):
    with pytest.raises(ValueError, match=message):
        run_length(config, samples)


def test_a_warm_up_in_steps_is_as_short_in_a_short_run():
    assert run_length(RunConfig(batch_size=8, epochs=1, optim=OptimConfig(warmup_steps=10)), 80) == (10, 10, 10)
    assert run_length(RunConfig(batch_size=8, epochs=1, optim=OptimConfig(warmup_steps=11)), 80) == (10, 10, 1)


@pytest.mark.parametrize(("epochs", "expected"), [(20.0, 100), (10.0, 100), (9.9, 9), (9.0, 9), (0.5, 0)])
def test_a_short_run_has_a_short_warm_up(epochs, expected):
    """Ten epochs of warm-up in a run that is shorter: a tenth of the run, in place of a refusal."""
    config = RunConfig(epochs=epochs, batch_size=8, optim=OptimConfig(warmup_epochs=10.0))
    assert run_length(config, 80)[2] == expected


def test_poly_with_every_number_different_from_zero_and_one():
    """A least rate of 0 hides the formula, and so does a first rate of 0; past the end the least rate stays."""
    base, least, first, warmup, total = 8e-4, 3e-4, 2e-4, 4, 10
    config = OptimConfig(lr=base, min_lr=least, warmup_lr=first, schedule="poly")
    by_hand = []
    for step in range(13):
        line = least + (base - least) * (10 - step) / 10 if step <= 10 else least
        by_hand.append(line * (0.25 + 0.75 * step / 4 if step < 4 else 1))
    assert [learning_rate(s, config, total, warmup) for s in range(13)] == pytest.approx(by_hand, rel=1e-12)
    assert learning_rate(0, config, total, 0) == pytest.approx(base)


@pytest.mark.parametrize(
    ("schedule", "after"),
    [("cosine", [0.9, 0.9 - 0.6 * (1 - 2**-0.5) / 2, 0.6, 0.6 - 0.6 * 2**-0.5 / 2, 0.3, 0.3]),
     ("linear", [0.9, 0.75, 0.6, 0.45, 0.3, 0.3]), ("constant", [0.9] * 6)],
)  # fmt: skip
def test_every_part_of_a_schedule_by_hand(schedule, after):
    """Three steps of warm-up from 0.1 to 0.9, then four down to 0.3, then the end, twice."""
    config = OptimConfig(lr=0.9, min_lr=0.3, warmup_lr=0.1, schedule=schedule)
    rates = [learning_rate(s, config, 7, 3) for s in range(9)]
    assert rates == pytest.approx([0.1, 0.5, 0.9, *after], rel=1e-12)


def test_short_warm_ups():
    config = OptimConfig(lr=0.9, min_lr=0.3, warmup_lr=0.1, schedule="linear")
    assert [learning_rate(s, config, 3, 0) for s in range(3)] == pytest.approx([0.9, 0.7, 0.5])
    assert [learning_rate(s, config, 3, 1) for s in range(3)] == pytest.approx([0.1, 0.9, 0.6])
    assert [learning_rate(s, config, 3, 2) for s in range(3)] == pytest.approx([0.1, 0.9, 0.9])
    assert [learning_rate(s, config, 3, 3) for s in range(5)] == pytest.approx([0.1, 0.5, 0.9, 0.9, 0.3])


def test_lengths_at_their_limits():
    config = RunConfig(batch_size=8, epochs=1, optim=OptimConfig(warmup_steps=1))
    assert run_length(config, 8) == (1, 1, 1)
    assert run_length(RunConfig(batch_size=8, epochs=9, steps=4, optim=OptimConfig(warmup_epochs=2)), 23) == (2, 4, 4)
    assert run_length(RunConfig(batch_size=4, epochs=3, optim=OptimConfig(warmup_epochs=1)), 11) == (2, 6, 2)


@pytest.mark.parametrize(
    ("batch", "per_device", "size", "parts"),
    [(12, 100, 1, 1), (12, 5, 1, 3), (12, 12, 1, 1), (12, 11, 1, 2), (12, 3, 2, 2), (12, 4, 3, 1), (12, 1, 4, 3)],
)
def test_micro_batches_are_the_epoch_in_order(batch, per_device, size, parts):
    """Every position once, each rank's share of a step in one piece, its parts nearly equal."""
    config = RunConfig(batch_size=batch, batch_per_device=per_device)
    assert accumulation(config, size) == parts
    shares = [list(requests_of(1, 5, 3, config, rank, size)) for rank in range(size)]
    local = batch // size
    for rank, requests in enumerate(shares):
        assert len(requests) == 4 * parts
        for number, step in enumerate(range(1, 5)):
            own = requests[number * parts : (number + 1) * parts]
            assert {request.epoch for request in own} == {step // 3}
            first = (step % 3) * batch + rank * local
            assert [int(p) for request in own for p in request.positions] == list(range(first, first + local))
            lengths = [len(request.positions) for request in own]
            assert max(lengths) - min(lengths) <= 1
            assert max(lengths) <= per_device


def test_a_run_whose_batch_size_was_changed_twice():
    """40 samples: from 4 to 8 after step 20 (epoch 2), then to 20 after step 27 (epoch 2 + 7/5 = 3.4)."""
    fresh = RunSchedule(RunConfig(batch_size=4, epochs=6), 40)
    assert (fresh.schedule_offset, fresh.data_offset) == (0, 0)
    with pytest.raises(AttributeError):
        fresh.data_offset = 1
    first = RunSchedule.after(RunConfig(batch_size=8, epochs=6), 40, 20, fresh.state(20))
    assert first.state(27) == {"total_steps": 40, "epoch": 3, "batch_size": 8, "offsets": [-10, -10]}
    second = RunSchedule.after(RunConfig(batch_size=20, epochs=6, eval_every=3), 40, 27, first.state(27))
    assert (second.schedule_offset, second.data_offset) == (-20, -20)  # step 27 is the 7th of two a epoch, of 6.8
    assert (second.epoch(27), second.samples_seen(27), second.last) == (3.5, 140, 32)
    requests = list(second.requests(27, 29, 0, 1))
    assert [(r.epoch, r.positions.tolist()) for r in requests] == [(3, [*range(20, 40)]), (4, [*range(20)])]
    assert [step for step in range(40) if second.evaluates(step, 30)] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]


def test_seeds():
    """The finaliser of splitmix64 in plain integers, chained, its lowest bit dropped."""

    def by_hand(*numbers):
        value, mask = 0, 2**64 - 1
        for number in numbers:
            value = (value + number + 0x9E3779B97F4A7C15) & mask
            value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
            value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
            value ^= value >> 31
        return value >> 1

    for numbers in [(0,), (1,), (0, 0), (3, 7), (7, 3), (2**40, 5, 123), ()]:
        assert seed_of(*numbers) == by_hand(*numbers)
    assert len({seed_of(a, b) for a in range(20) for b in range(20)}) == 400
