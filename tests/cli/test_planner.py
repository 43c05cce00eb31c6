"""Plans for a GPU that is not here: arithmetic from data sheets, or a record where there is one."""

import json

import pytest

from beit_fast.cli import gpus
from beit_fast.cli.plan import on_gpu
from beit_fast.train.tasks.pretrain import ModelConfig, PretrainConfig

NUMBERS = {
    "activation_bytes_per_sample": 2e9, "state_bytes": 6e9, "flops_per_image": 300e9, "tokenizer_flops_per_image": 50e9,
    "steps": 1000,
}  # fmt: skip


def config(**changes):
    return PretrainConfig(batch_size=2048, plan_gpu="H100", gpus=8, model=ModelConfig(size="large"), **changes)


def test_time_and_memory_of_a_named_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "RECORDS", tmp_path)
    (_, time), (_, batch) = on_gpu(config(), NUMBERS, "images")
    # 0.3 x 989e12 / 350e9 = 848 images/s on each of 8; 2,048,000 images take 302 s
    assert "848 images/s each (estimate: 30 % of 989 TFLOP/s, not measured)" in time
    assert time.startswith("5 min")
    # 0.94 x 79.1 GiB - 6e9 = 73.8e9 bytes at 1e9 per sample (bf16 halves what fp32 took here)
    assert batch.startswith("--batch-per-device 72 of 79 GiB")
    (_, (_, split)) = on_gpu(config(parallel="fsdp2", precision="fp32"), NUMBERS, "images")
    assert split.startswith("--batch-per-device 32")  # (79.8e9 - 0.75e9) / 2e9 = 39


def test_a_record_takes_the_place_of_the_estimate(tmp_path, monkeypatch):
    entries = [
        {"group": "pre-training, forward and backward: BEiT-large",
         "extra_info": {"rival": "beit_fast", "images_per_s": 9}},
        {"group": "pre-training, whole step with DALL-E's tokenizer: BEiT-large",
         "extra_info": {"rival": "timm", "images_per_s": 10}},
        {"group": "pre-training, whole step with DALL-E's tokenizer: BEiT-large",
         "extra_info": {"rival": "beit_fast", "images_per_s": 700}},
    ]  # fmt: skip
    path = tmp_path / "2027-01-01_nvidia-h100-80gb-hbm3_gpu.json"
    path.write_text(json.dumps({"benchmarks": entries}))
    assert gpus.measured_images_per_s(gpus.named("h100"), "large", tmp_path) == (700.0, path.name)
    assert gpus.measured_images_per_s(gpus.named("h100"), "base", tmp_path) is None
    assert gpus.measured_images_per_s(gpus.named("H200"), "large", tmp_path) is None


def test_unknown_gpus_are_answered_with_the_list():
    with pytest.raises(ValueError, match="--plan-gpu H900 is not known; choose from V100"):
        gpus.named("H900")
