"""Masked image modelling through the real pipeline: images from disk, tokenizer, BEiT, engine."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import beit_fast
from beit_fast.cli.train import main
from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks.pretrain import (
    DataConfig,
    EvaluationConfig,
    MaskedImageModeling,
    MaskingConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
    multiply_adds,
)
from tests.images import write_scenes


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A flat folder of 24 small JPEG files."""
    return write_scenes(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture
def config(images, tmp_path):
    return PretrainConfig(
        output_dir=tmp_path / "run",
        steps=4,
        batch_size=6,
        batch_per_device=6,
        data=DataConfig(path=str(images), threads=1),
        model=ModelConfig(width=32, depth=2, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.5),
        masking=MaskingConfig(num_masked=6, min_num_patches=2),
        tokenizer=TokenizerConfig(name="random"),
        optim=OptimConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=1, progress="none"),
    )


def run(config, **changes):
    config = dataclasses.replace(config, **changes)
    return engine.run(MaskedImageModeling(config)), config.output_dir


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def test_multiply_adds_of_the_paper_models():
    base = multiply_adds(BeitConfig.from_preset("base"), 75)
    large = multiply_adds(BeitConfig.from_preset("large"), 75)
    assert base / 1e9 == pytest.approx(18.03, abs=0.01)
    assert 6 * large / 1e9 == pytest.approx(373, abs=0.5)
    # BEiT-B by hand: 197 tokens of 768; queries, keys, values and output, two products of attention, a fourfold MLP
    block = 197 * 768 * (4 * 768 + 2 * 197 + 8 * 768)
    assert base == 196 * 768 * 768 + 12 * block + 75 * 768 * 8192


@pytest.mark.parametrize("size", ["base", "large"])
def test_multiply_adds_are_those_that_torch_counts(size):
    config = BeitConfig.from_preset(size).for_classification(1000)
    with torch.device("meta"), torch.no_grad(), beit_fast.use_backend("reference"):
        model, images = Beit(config).eval(), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            model(images)
    assert counter.get_total_flops() == 2 * multiply_adds(config)


def test_multiply_adds_of_pretraining_are_those_that_torch_counts():
    """What the last block saves, output and MLP at the 10 of 17 tokens that are not masked, is not subtracted."""
    config = BeitConfig.from_preset("tiny", image_size=32, patch_size=8, width=32, depth=3, num_heads=2, vocab_size=50)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, 5:12] = True
    model = BeitForMaskedImageModeling(config).eval()
    with torch.no_grad(), beit_fast.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32), mask, torch.zeros(1, 7, dtype=torch.long))
    assert counter.get_total_flops() + 2 * 10 * 9 * 32 * 32 == 2 * multiply_adds(config, 7)


def test_resume_is_bit_exact(config, weights, tmp_path):
    _, whole = run(config)
    run(config, output_dir=tmp_path / "broken", max_steps=1)
    run(config, output_dir=tmp_path / "broken", max_steps=3)
    _, broken = run(config, output_dir=tmp_path / "broken")
    assert weights(whole) == weights(broken)
    assert losses(whole) == losses(broken)
    assert losses(whole)[0] == pytest.approx(math.log(8192), abs=0.2)


@pytest.mark.parametrize("mode", ["exact", "official"])
def test_split_does_not_matter(config, weights, tmp_path, mode):
    """Drop path and ragged masks included: they belong to the sample, and the loss to the global batch."""
    masking = dataclasses.replace(config.masking, mode=mode)
    _, one = run(config, masking=masking)
    _, split = run(config, masking=masking, output_dir=tmp_path / "split", batch_per_device=4)
    assert losses(split) == pytest.approx(losses(one), rel=1e-5)
    (_, a), (_, b) = weights(one), weights(split)
    for name in a:
        if name.startswith("optimizer") and not name.endswith("step"):
            x, y = (torch.frombuffer(bytearray(v), dtype=torch.float32) for v in (a[name], b[name]))
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6, msg=name)


def test_evaluation_against_its_definitions(config, monkeypatch):
    """A model that answers with the tokens' marginal distribution is at their entropy, whatever the context."""
    config = dataclasses.replace(config, steps=1, evaluation=EvaluationConfig(images=10))
    monkeypatch.setenv("BEIT_FAST_CACHE", str(config.output_dir.parent / "cache"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, builtin_size=48))
    task = MaskedImageModeling(config)
    try:
        from beit_fast.train.distributed.world import World

        model = task.build(World(0, 1, torch.device("cpu"))).eval()
        tokens = torch.cat(
            [
                task.tokenizer.encode(batch.token_images)
                for batch in task.held_out.batches([type("R", (), {"epoch": 0, "positions": np.arange(10)})()])
            ]
        )
        share = torch.bincount(tokens.flatten(), minlength=8192).double() / tokens.numel()
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias.copy_(share.clamp_min(1e-12).log())
            result = task.evaluate(model, 0)
    finally:
        task.close()
    entropy = float(-(share[share > 0] * share[share > 0].log()).sum())
    assert result["token_entropy_nats"] == pytest.approx(entropy, rel=1e-6)
    assert result["other_context_loss"] == pytest.approx(result["held_out_loss"], rel=1e-5)
    assert result["held_out_loss"] == pytest.approx(entropy, abs=0.8)  # masked positions only, few images
    assert result["held_out_images"] == 10


def test_more_held_out_images_than_there_are(config, images):
    evaluation = EvaluationConfig(images=500, path=str(images), pictures=0)
    _, folder = run(config, steps=1, evaluation=evaluation)
    assert [
        line["held_out_images"] for line in read_metrics(folder / "metrics.jsonl") if "held_out_images" in line
    ] == [24]


def test_broken_images_are_listed_and_the_run_goes_on(config, images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "000.jpg").write_bytes(b"")
    data = dataclasses.replace(config.data, path=str(folder), max_bad_share=0.05)
    result, out = run(config, data=data)
    assert result.step == 4
    assert "000.jpg" in (out / "bad_files.tsv").read_text()
    assert read_metrics(out / "metrics.jsonl")[-1]["bad_images"] == 1


def test_too_many_broken_images_end_the_run(config, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(sorted(images.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes() if number % 4 else b"no image")
    with pytest.raises(SystemExit) as stop:
        main(config, MaskedImageModeling, arguments=["--data.path", str(folder)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert "of 24 images cannot be used" in error
    assert "bad_files.tsv" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "/no/such/folder"], "no such folder: /no/such/folder"),
        (["--tokenizer.name", "/no/such/file.pkl"], "tokenizer '/no/such/file.pkl' not found"),
        (["--tokenizer.name", "{damaged}"], "damaged.safetensors"),
        (["--model.image-size", "33"], "33"),
        (["--masking.num-masked", "99"], "num_masked"),
        (["--model.num-heads", "5"], "num_heads 5"),
    ],
)
def test_bad_input_is_one_line(config, arguments, message, tmp_path, capsys):
    (tmp_path / "damaged.safetensors").write_bytes(b"not a tensor file")
    arguments = [a.replace("{damaged}", str(tmp_path / "damaged.safetensors")) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(config, MaskedImageModeling, arguments=arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_dry_run_plans_and_trains_nothing(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(config, MaskedImageModeling, arguments=["--dry-run", "--batch-per-device", "3", "--steps", "100"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    model = config.model.architecture(8192)
    assert f"{6 * multiply_adds(model, 6) / 1e9:,.2f}e9" in text
    for row in (
        "parameters",
        "tokenizer FLOPs per image",
        "memory per device",
        "disk",
        "6 = 1 devices x 2 x 3",
        "steps",
    ):
        assert row in text
    assert not Path(config.output_dir).exists()


def test_plan_counts_what_autograd_keeps():
    """Two linear layers and a GELU keep their inputs: (4 x 8, 4 x 16, 4 x 16) floats; the weights do not count."""
    from beit_fast.cli.plan import SavedForBackward

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 2))
    with SavedForBackward(model.parameters()) as saved:
        model(torch.randn(4, 8))
    assert saved.bytes == 4 * 4 * (8 + 16 + 16)
