"""The numbers of a plan by hand: a task whose every size is known, and a clock that says what it is told."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from beit_fast.cli import plan as planner
from beit_fast.train.config import CheckpointConfig, OptimConfig, RunConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.task import StepOutput, Task
from beit_fast.train.tasks.finetune import FinetuneConfig, LabelledDataConfig
from beit_fast.train.tasks.pretrain import DataConfig, PretrainConfig


class HandTask(Task):
    """180,500 parameters, of which 300 are not trained, and 100,200 frozen ones; a sample keeps 400 + 300 floats."""

    name, sample_noun = "hand", "samples"
    prepared_epochs: ClassVar = {"prepared_epochs": 2}

    def build(self, world):
        self.device = world.device
        model = nn.Sequential(nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 200))
        model[0].bias.requires_grad_(False)
        return model.to(world.device)

    def num_samples(self):
        return 50

    def frozen(self):
        return [nn.Linear(500, 200)]

    def batches(self, requests):
        requests = list(requests)
        HandTask.asked = [(request.epoch, request.positions.tolist()) for request in requests]
        for request in requests:
            yield torch.ones(len(request.positions), 400, device=self.device)

    def prepare(self, batch, step):
        assert step == 0
        return batch

    def loss(self, model, batch, num_targets):
        assert num_targets.is_meta or num_targets == len(batch)
        assert model.training
        return StepOutput(model(batch).sum(), {})

    def plan(self):
        return {
            "flops_per_image": 3e9,
            "tokenizer_flops_per_image": 2e9,
            "token_cache_bytes": 4e6,
            "prepared_epochs": 2,
        }

    def plan_lines(self):
        return [("last", "line")]


@pytest.fixture
def by_clock(monkeypatch):
    """`by_clock(config, stand_in, data, prepare, train)`: the plan where these took so many seconds."""

    def run(config, stand_in, *seconds, repeats=1):
        times = list(accumulate(seconds, initial=0.0))
        monkeypatch.setattr(planner, "time", SimpleNamespace(perf_counter=iter(times * repeats).__next__))
        monkeypatch.setattr(planner, "capacity_bytes", lambda device: 10_000_000)
        monkeypatch.setattr(planner.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 2**30))
        return planner.plan(HandTask, config, stand_in)

    return run


@pytest.fixture
def config(tmp_path):
    return RunConfig(
        output_dir=tmp_path / "not" / "yet" / "there", device="cpu", precision="fp32", batch_size=12,
        batch_per_device=5, epochs=10, max_steps=30, checkpoint=CheckpointConfig(keep=2),
        optim=OptimConfig(ema_decay=0.9),
    )  # fmt: skip


def test_all_numbers(by_clock, config, capsys):
    """4 steps of 12 per epoch in micro-batches of 4; the first two epochs prepare their batches."""
    numbers = by_clock(config, False, 1.5, 2.0, 4.0)
    assert HandTask.asked == [(0, [0, 1, 2, 3]), (0, [4, 5, 6, 7]), (0, [8, 9, 10, 11])]
    assert numbers == {
        "parameters": 280_700, "trained_parameters": 180_200, "samples": 50, "assumed": 0, "steps_per_epoch": 4,
        "schedule_steps": 40, "steps": 30, "micro_batch": 4, "accumulation": 3,
        "state_bytes": 4_007_200, "frozen_bytes": 400_800, "weights_bytes": 722_000, "gradients_bytes": 720_800,
        "moments_bytes": 1_441_600, "averages_bytes": 722_000,
        "activation_bytes": 11_200, "activation_bytes_per_sample": 2800,
        "largest_micro_batch": 1920,  # (9,400,000 - 4,007,200) // 2800 = 1926, of which a multiple of 8
        "checkpoint_bytes": 2_885_600, "disk_bytes": 3 * 2_885_600,
        "data_ms_per_sample": 375, "prepare_ms_per_sample": 500, "train_ms_per_sample": 1000,
        "run_s": 8 * 3 * 6 + 22 * 3 * 4, "saved_s": 22 * 3 * 2,
        "flops_per_image": 3e9, "tokenizer_flops_per_image": 2e9, "token_cache_bytes": 4e6, "prepared_epochs": 2,
    }  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "plan of hand; nothing is trained",
        "  device                     1 x CPU, fp32",
        "  parameters                 280,700 (180,200 trained)",
        "  FLOPs per image            3.00e9",
        "  tokenizer FLOPs per image  2.00e9",
        "  data                       50 samples, 4 steps per epoch",
        "  steps                      30 of a schedule of 40",
        "  batch                      12 = 1 devices x 3 x 4",
        "  memory per device          3.83 MiB = 0.69 MiB weights + 0.38 MiB frozen + 0.69 MiB gradients + 1.37 MiB"
        " moments + 0.69 MiB averages + 0.01 MiB activations of 4 samples",
        "  largest batch              --batch-per-device 1920 by this arithmetic (estimate)",
        "  disk                       2.75 MiB per checkpoint, 8.26 MiB in all; 5,120 MiB free",
        "  token cache                3.81 MiB on disk; from epoch 2 on no tokenizer, 2 min 12 s saved",
        "  time per sample            1,000.0 ms forward and backward, 500.0 ms before it, 375.0 ms of data beside it",
        "  time                       6 min 48 s on 1 of this device (from one micro-batch)",
        "  last                       line",
    ]


def test_a_run_that_waits_for_its_data(by_clock, config):
    numbers = by_clock(config, False, 9.0, 2.0, 4.0)
    assert (numbers["run_s"], numbers["saved_s"]) == (30 * 3 * 9, 0)


def test_a_run_without_a_cache_prepares_every_batch(by_clock, config, monkeypatch):
    monkeypatch.setattr(HandTask, "prepared_epochs", {})
    monkeypatch.setattr(HandTask, "plan", lambda self: {})
    numbers = by_clock(replace(config, epochs=200, max_steps=None), False, 1.0, 2.0, 4.0)
    assert (numbers["run_s"], numbers["saved_s"]) == (800 * 3 * 6, 0)


def test_another_device_is_timed_at_its_fourth_batch(by_clock, config, monkeypatch):
    """Of two steps, as one has three; the first pass is not counted."""
    monkeypatch.setattr(planner, "start_world", lambda device: World(0, 1, torch.device("meta")))
    monkeypatch.setattr(planner.torch, "autocast", lambda *arguments, **options: nullcontext())
    numbers = by_clock(config, False, 1.0, 2.0, 4.0, repeats=4)
    assert numbers["run_s"] == 8 * 3 * 6 + 22 * 3 * 4
    assert [positions[0] for _, positions in HandTask.asked] == [0, 4, 8, 12, 16, 20]
    by_clock(PretrainConfig(output_dir=config.output_dir, precision="fp32"), True, 1.0, 2.0, 4.0, repeats=4)
    assert HandTask.asked == [(0, [0, 1]), (0, [2, 3]), (0, [4, 5]), (0, [6, 7])]


def test_two_devices_share_the_batch(by_clock, config, monkeypatch):
    monkeypatch.setattr(planner, "start_world", lambda device: World(0, 2, torch.device("cpu")))
    numbers = by_clock(config, False, 1.0, 2.0, 4.0)  # six samples of a device in two micro-batches of three
    assert (numbers["micro_batch"], numbers["accumulation"]) == (3, 2)
    assert (numbers["run_s"], numbers["activation_bytes"]) == (8 * 2 * 6 + 22 * 2 * 4, 3 * 2800)
    monkeypatch.setattr(planner, "STANDING_IN", 2)
    many = PretrainConfig(output_dir=config.output_dir, precision="fp32", batch_size=64, batch_per_device=16)
    assert by_clock(many, True, 1.0, 2.0, 4.0)["activation_bytes_per_sample"] == 2800
    assert HandTask.asked == [(0, [0])]


def test_what_stands_in_for_the_data_of_a_recipe(tmp_path):
    """Classes and images of the data set that is demanded; with a path, or of no data set with a name, as they are."""
    named = FinetuneConfig(scratch=True, data=LabelledDataConfig(num_classes=21_841))
    changed, images = planner.without_data(named)
    assert (images, changed.data.builtin_images, changed.data.validate) == (14_197_122, 64, False)
    assert planner.without_data(FinetuneConfig(scratch=True, data=LabelledDataConfig(num_classes=7)))[1] == 1_281_167
    for normalization, count in (("imagenet", 1_281_167), ("half", 14_197_122)):
        assert planner.without_data(PretrainConfig(data=DataConfig(normalization=normalization)))[1] == count
    given = replace(named, data=replace(named.data, path=str(tmp_path)))
    for config in (given, RunConfig(), PretrainConfig(defaults_by_images_seen=True)):
        assert planner.without_data(config) == (config, None)
    few = replace(changed.data, num_classes=3, builtin_images=8, builtin_size=16, cache_dir=str(tmp_path))
    images, validation = few.open()
    own, _ = LabelledDataConfig.open(replace(few, num_classes=None))
    assert images.labels.tolist() == [label % 3 for label in own.labels.tolist()]
    assert (images.classes, validation) == (("0", "1", "2"), None)


def test_images_that_are_not_there(by_clock, tmp_path, capsys):
    """The paper's run, of 800 epochs of ImageNet in batches of 2048, from two samples of the built-in images."""
    config = PretrainConfig(output_dir=tmp_path, device="cpu", precision="fp32", batch_size=2048, batch_per_device=64)
    numbers = by_clock(config, True, 1.0, 2.0, 4.0)
    expected = {
        "samples": 1_281_167, "assumed": 1, "steps_per_epoch": 625, "schedule_steps": 500_000, "steps": 500_000,
        "micro_batch": 64, "accumulation": 32, "activation_bytes": 64 * 2800, "activation_bytes_per_sample": 2800,
        "averages_bytes": 0, "data_ms_per_sample": 500, "prepare_ms_per_sample": 1000, "train_ms_per_sample": 2000,
        "token_cache_bytes": 4e6 * 1_281_167 / 50, "run_s": 1250 * 1024 * 6 + 498_750 * 1024 * 4,
    }  # fmt: skip
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    note = "steps per epoch (of the data that the recipe is for; built-in images stand in)"
    assert f"1,281,167 samples, 625 {note}" in capsys.readouterr().out


def test_the_sizes_of_the_data_sets_that_recipes_are_for():
    """ImageNet-1k, which pre-training without classes means too, ImageNet-22k, CIFAR-100 and ADE20K."""
    images = {None: 1_281_167, 1000: 1_281_167, 21_841: 14_197_122, 100: 50_000, 150: 20_210}
    assert images == planner.IMAGES
    assert (planner.STANDING_IN, planner.MEASURED_ON_CPU) == (64, 2)
