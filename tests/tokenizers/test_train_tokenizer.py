"""The recipe's task through the engine, at the size of a test."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from beit_fast.tokenizers import load_tokenizer
from beit_fast.train import engine
from beit_fast.train.config import LogConfig, OptimConfig
from beit_fast.train.tasks.tokenizer import QuantizerConfig, TokenizerDataConfig, TrainTokenizer, TrainTokenizerConfig


def small(folder: Path, name: str) -> TrainTokenizerConfig:
    return TrainTokenizerConfig(
        output_dir=folder / name,
        steps=8,
        batch_size=4,
        batch_per_device=2,
        precision="fp32",
        device="cpu",
        hidden_dim=8,
        codebook_dim=4,
        vocab_size=100,
        held_out_images=2,
        optim=OptimConfig(lr=2e-3, warmup_steps=1, weight_decay=1e-4, clip_grad=1.0),
        log=LogConfig(every_steps=2, progress="none"),
        data=TokenizerDataConfig(builtin_images=16, cache_dir=folder / "cache", view_sizes=(32, 48)),
        quantizer=QuantizerConfig(
            live_codes=32, init_latents=128, autoencoder_steps=3, reseed_every_steps=2, reseed_after_steps=1
        ),
    )


def run(config: TrainTokenizerConfig) -> engine.RunResult:
    return engine.run(TrainTokenizer(config))


def test_train_continue_and_load(tmp_path: Path) -> None:
    whole = small(tmp_path, "whole")
    result = run(whole)
    assert (result.exit_code, result.step) == (0, 8)
    assert 0 < result.metrics["held_out_mae_32px"] < 1
    assert 1 <= result.metrics["held_out_used_codes_48px"] <= 32

    broken = small(tmp_path, "broken")
    run(dataclasses.replace(broken, max_steps=5))  # in the middle of the quantised part
    run(broken)
    one, two = (load_file(tmp_path / name / "tokenizer.safetensors") for name in ("whole", "broken"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    file = tmp_path / "whole" / "tokenizer.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert "functional check" in metadata["data"]
    assert metadata["live_codes"] == "32"
    assert (tmp_path / "whole" / "reconstructions_32px.png").exists()
    tokenizer = load_tokenizer(file)
    ids = tokenizer.encode(torch.rand(2, 3, 32, 32))
    assert tokenizer.vocab_size == 100
    assert int(ids.max()) < 32


def test_a_run_that_ends_before_there_are_codes_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(small(tmp_path, "run"), steps=3)
    with pytest.raises(
        ValueError, match=r"--steps 3 ends before there is a tokenizer: .*--quantizer.autoencoder-steps 3"
    ):
        run(config)
    assert not list((config.output_dir / "checkpoints").iterdir())


def test_plan(tmp_path: Path) -> None:
    """FLOPs of the first convolution and of the rest, by hand."""
    config = small(tmp_path, "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, view_sizes=(32,)))
    res = 8 * 8 * (9 + 9 + 1)
    encoder = 16 * 16 * (48 * 8 + res) + (8 * 8 + 4 * 4) * (16 * 64 + res) + 16 * 8 * 4
    nearest = 16 * 4 * 32
    decoder = 4 * 4 * 16 * 4 * 8 + (8 * 8 + 16 * 16) * 16 * 64 + (8 * 8 + 16 * 16 + 32 * 32) * res + 32 * 32 * 8 * 3
    plan = TrainTokenizer(config).plan()
    assert plan["forward_flops_per_image"] == 2 * (encoder + nearest + decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 31}, "live-codes 32 exceeds"),
        ({"view_sizes": (60,)}, "multiples of 8"),
        ({"quantizer": QuantizerConfig(live_codes=32, init_latents=100)}, "init_latents"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    config = small(tmp_path, "run")

    def changed() -> TrainTokenizerConfig:
        if "view_sizes" in change:
            return dataclasses.replace(config, data=dataclasses.replace(config.data, **change))  # type: ignore[arg-type]
        return dataclasses.replace(config, **change)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=message):
        run(changed())
