"""Runs and checkpoints of earlier versions are continued as the version that made them continues them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.tasks import pretrain

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_073a3e4"
EXPECTED = json.loads((FIXTURE / "expected" / "expected.json").read_text())


def config(folder, **more):
    values = {
        "output_dir": Path(folder), "device": "cpu", "steps": 12, "batch_size": 8, "batch_per_device": 4,
        "precision": "fp32", "seed": 3,
        "data": pretrain.DataConfig(builtin_images=20, builtin_size=48, threads=1, decoder="pil"),
        "model": pretrain.ModelConfig(
            size="tiny", width=8, depth=2, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.2
        ),
        "masking": pretrain.MaskingConfig(num_masked=6, min_num_patches=2),
        "tokenizer": pretrain.TokenizerConfig(name="tokenizer.safetensors"),
        "evaluation": pretrain.EvaluationConfig(images=8, pictures=0),
        "optim": OptimConfig(lr=1e-3, warmup_steps=2, ema_decay=0.9),
        "checkpoint": CheckpointConfig(every_steps=5, background="off"),
        "log": LogConfig(every_steps=2, progress="lines"),
    }  # fmt: skip
    return pretrain.PretrainConfig(**(values | more))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the fixture as the current folder: the tokenizer's name, part of the run, is relative to it."""
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.setenv("BEIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "copy")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "copy"
    torch.set_num_threads(threads)


class Observed(pretrain.MaskedImageModeling):
    """Keeps what it trains on, and the state that it starts from."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def batches(self, requests):
        for batch in super().batches(requests):
            self.seen.append([batch.epoch, batch.indices.tolist(), batch.masked_indices.tolist()])
            yield batch


def digest(path):
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def same_machine():
    """Whether the kernels chosen for this CPU are those of the fixture's: others round in another order."""
    here = torch.backends.cpu.get_cpu_capability(), torch.__version__.split("+")[0]
    return here == (EXPECTED["cpu_capability"], EXPECTED["torch"])


@pytest.mark.parametrize("name", ["run", "sharded"])
def test_a_run_of_073a3e4_is_continued_as_by_itself(folder, name):
    own = config(name, max_steps=9)
    task = Observed(own)
    result = engine.run(task)
    assert (result.exit_code, result.step) == (0, 9)
    assert task.seen[: len(EXPECTED["data_order"])] == EXPECTED["data_order"]
    final = folder / name / "checkpoints" / "step_00000009"
    model, expected = (
        load_file(final / "model.safetensors"),
        load_file(folder / "expected" / f"{name}_model.safetensors"),
    )
    assert model.keys() == expected.keys()
    for key, tensor in model.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)
    for key, value in EXPECTED["metrics"][name].items():
        assert result.metrics[key] == pytest.approx(value, rel=1e-6), key
    if same_machine():
        for file in ("model", "optimizer", "ema"):
            assert digest(final / f"{file}.safetensors") == EXPECTED["digests"][f"{name}/{file}"], file
        assert {key: result.metrics[key] for key in EXPECTED["metrics"][name]} == EXPECTED["metrics"][name]


def test_the_state_of_073a3e4_is_restored_exactly(folder, monkeypatch):
    """A checkpoint taken at once holds the bytes that were read, whatever the machine."""
    own = config("run", max_steps=6, optim=OptimConfig(lr=1e-3, warmup_steps=2, ema_decay=0.9, max_skipped_steps=10**9))
    monkeypatch.setattr(engine.TrainingRun, "train_step", lambda run, group: None)
    monkeypatch.setattr(engine.TrainingRun, "log_metrics", lambda run: None)
    engine.run(pretrain.MaskedImageModeling(own))
    before, after = (folder / "run" / "checkpoints" / f"step_0000000{step}" for step in (5, 6))
    for file in ("model", "optimizer", "ema"):
        assert digest(after / f"{file}.safetensors") == digest(before / f"{file}.safetensors"), file
    states = [json.loads((path / "state.json").read_text()) for path in (before, after)]
    for key in ("interval", "anomalies", "scaler", "skipped", "identity", "total_steps"):
        assert states[0][key] == states[1][key], key


def test_earlier_lines_of_metrics_stay(folder):
    before = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    own = config("run", max_steps=6)
    engine.run(pretrain.MaskedImageModeling(own))
    after = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in after[: len(before)]] == [json.loads(line) for line in before]
