"""The discrete VAE of DALL-E: its density, its divergence, its schedules, and a run whose files load as DALL-E's do."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from beit_fast.tokenizers import DalleTokenizer, load_tokenizer
from beit_fast.train import engine
from beit_fast.train.config import LogConfig, OptimConfig
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks.dvae import RelaxedVAE, TrainRelaxedVAE, half_cosine, logit_laplace, tokenizer_task
from beit_fast.train.tasks.tokenizer import RelaxationConfig, TokenizerDataConfig, TrainTokenizer, TrainTokenizerConfig


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-3.0, 0.7)])
def test_the_density_is_one(mean, log_scale):
    """Over (0, 1) it integrates to 1, and half of it lies below the pixel whose logit is the mean."""
    edges = torch.sigmoid(torch.linspace(-40, 40, 400_001, dtype=torch.float64))
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    inside = (middle > 0) & (middle < 1) & (width > 0)
    middle, width = middle[inside], width[inside]
    density = torch.exp(-logit_laplace(middle, torch.tensor(mean), torch.tensor(log_scale)))
    assert float((density * width).sum()) == pytest.approx(1, abs=1e-5)
    below = middle < torch.sigmoid(torch.tensor(mean, dtype=torch.float64))
    assert float((density * width)[below].sum()) == pytest.approx(0.5, abs=1e-4)


def test_schedules_are_those_of_the_paper(tmp_path):
    task = TrainRelaxedVAE(TrainTokenizerConfig(objective="dvae", steps=3_000_000, output_dir=tmp_path))
    task.total_steps = 3_000_000
    assert task.schedule(0) == (1.0, 0.0)
    assert task.schedule(150_000)[0] == task.schedule(2_999_999)[0] == 1 / 16
    assert task.schedule(5_000)[1] == pytest.approx(6.6)
    assert task.schedule(75_000)[0] == pytest.approx((1 + 1 / 16) / 2)
    assert task.schedule(2_500)[1] == pytest.approx(3.3)
    assert half_cosine(2.0, 1.0, 0.25) == pytest.approx(1.5 + 0.5 * math.cos(math.pi / 4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return RelaxedVAE(hidden_dim=4, vocab_size=24, n_init=8, blocks=1)


def test_the_divergence_is_that_from_the_uniform_distribution(model):
    images = torch.rand(2, 3, 16, 24)
    _, kl, _ = model(images)
    logits = model.encoder(0.8 * images + 0.1).permute(0, 2, 3, 1)
    uniform = torch.distributions.Categorical(logits=torch.zeros(24))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), uniform)
    torch.testing.assert_close(kl, expected.mean((1, 2)))


def test_at_a_low_temperature_tokens_are_drawn_from_q(model):
    """The limit of the relaxation is a sample; its likelihood is that of the decoder on hard tokens."""
    torch.manual_seed(1)
    with torch.no_grad():
        model.encoder.blocks.output.conv.w.mul_(3)
        images = torch.rand(1, 3, 8, 8).expand(4000, -1, -1, -1)
        seen = []
        model.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        nll, _, reconstruction = model(images, 1e-6)
        assert float(seen[0].amax(1).min()) > 0.99  # nearly one-hot
        drawn = seen[0].flatten(1).argmax(1)
        q = model.encoder(0.8 * images[:1] + 0.1).softmax(1).flatten()
        hard = [model.decoder(F.one_hot(torch.tensor(k), 24).float().view(1, 24, 1, 1)) for k in range(24)]
        means = torch.stack([(torch.sigmoid(out[0, :3]) - 0.1) / 0.8 for out in hard]).clamp(0, 1)
        share = torch.bincount(drawn, minlength=24) / 4000
        expected = torch.stack([
            logit_laplace(0.8 * images[0] + 0.1, out[0, :3], out[0, 3:]).mean() for out in hard
        ])  # fmt: skip
    assert ((share - q).abs() < 4 * (q * (1 - q) / 4000).sqrt() + 1e-4).all()
    torch.testing.assert_close(nll, expected[drawn], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reconstruction, means[drawn], rtol=1e-2, atol=1e-2)


def small(folder: Path, name: str) -> TrainTokenizerConfig:
    return TrainTokenizerConfig(
        objective="dvae", output_dir=folder / name, steps=8, batch_size=4, batch_per_device=2, precision="fp32",
        device="cpu", hidden_dim=4, vocab_size=32, held_out_images=2,
        optim=OptimConfig(lr=2e-3, warmup_steps=1, weight_decay=1e-4, clip_grad=1.0),
        log=LogConfig(every_steps=2, progress="none"),
        data=TokenizerDataConfig(builtin_images=16, cache_dir=folder / "cache", view_sizes=(32,)),
        dvae=RelaxationConfig(blocks=1, n_init=8, temperature_share=0.5, kl_share=0.5),
    )  # fmt: skip


def run(config: TrainTokenizerConfig) -> engine.RunResult:
    return engine.run(tokenizer_task(config))


def test_train_continue_and_load(tmp_path):
    whole, broken = small(tmp_path, "whole"), small(tmp_path, "broken")
    result = run(whole)
    assert 0 < result.metrics["held_out_mae_32px"] < 1
    assert 1 <= result.metrics["held_out_perplexity_32px"] <= 32
    run(dataclasses.replace(broken, max_steps=5))
    run(broken)
    for part in ("encoder", "decoder"):
        one, two = (load_file(tmp_path / name / f"{part}.safetensors") for name in ("whole", "broken"))
        assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[0]["temperature"] > lines[-1]["temperature"] == pytest.approx(1 / 16)
    assert lines[0]["kl_weight"] < lines[-1]["kl_weight"] == pytest.approx(6.6)
    tokenizer = load_tokenizer(tmp_path / "whole" / "encoder.safetensors")
    assert isinstance(tokenizer, DalleTokenizer)
    ids = tokenizer.encode(torch.rand(1, 3, 32, 32))
    assert tokenizer.decode(ids).shape == (1, 3, 32, 32)


@pytest.mark.slow
def test_it_learns_pixels(tmp_path):
    config = dataclasses.replace(
        small(tmp_path, "run"), steps=90, log=LogConfig(every_steps=30, progress="none"), held_out_images=0,
        optim=OptimConfig(lr=1e-2, warmup_steps=5, weight_decay=1e-4, clip_grad=1.0),
    )  # fmt: skip
    run(config)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[-1]["nll_per_value"] < lines[0]["nll_per_value"] - 0.03
    assert lines[-1]["mae"] < 0.95 * lines[0]["mae"], [line["mae"] for line in lines]


def test_each_objective_has_its_task():
    assert type(tokenizer_task(TrainTokenizerConfig())) is TrainTokenizer
    assert type(tokenizer_task(TrainTokenizerConfig(objective="dvae"))) is TrainRelaxedVAE


def test_plan_counts_both_networks(tmp_path):
    config = small(tmp_path, "run")
    plan = TrainRelaxedVAE(config).plan()
    first, last = 32 * 32 * 3 * 49 * 4, 32 * 32 * 4 * 6
    assert plan["forward_flops_per_image"] > 2 * (first + last)
