"""The ablations of pre-training through the engine: pixels, all patches, no mask."""

import dataclasses
import math

import pytest
import torch

from beit_fast.models import Beit
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks.finetune import ClassifierModelConfig
from beit_fast.train.tasks.pretrain import (
    DataConfig,
    EvaluationConfig,
    MaskedImageModeling,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainConfig,
    TokenizerConfig,
)
from beit_fast.train.tasks.weights import load_weights
from tests.images import write_scenes

MODEL = {"width": 32, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8, "drop_path_rate": 0.0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture
def config(images, tmp_path):
    return PretrainConfig(
        output_dir=tmp_path / "run",
        steps=4,
        batch_size=6,
        batch_per_device=6,
        data=DataConfig(path=str(images), normalization="half", threads=1),
        model=ModelConfig(**MODEL),
        masking=MaskingConfig(num_masked=6, min_num_patches=2),
        tokenizer=TokenizerConfig(name="demo"),
        evaluation=EvaluationConfig(images=8, path=str(images)),
        optim=OptimConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=4),
        log=LogConfig(every_steps=1, progress="none"),
    )


def run(config, **changes):
    config = dataclasses.replace(config, **changes)
    engine.run(MaskedImageModeling(config))
    lines = list(read_metrics(config.output_dir / "metrics.jsonl"))
    return [line["loss"] for line in lines if line["kind"] == "train"], lines[-1]


def test_pixels_need_no_tokenizer_and_give_weights_to_fine_tune(config):
    losses, held_out = run(
        config, objective=ObjectiveConfig(target="pixels"), tokenizer=TokenizerConfig(name="/nowhere.pkl"), steps=40
    )
    assert losses[-1] < losses[0] < 2
    assert 0 < held_out["pixel_variance"] < 1
    assert held_out["held_out_loss"] < 2
    assert "token_entropy_nats" not in held_out
    model = Beit(ClassifierModelConfig(**MODEL).classifier(3))
    before = model.patch_embed.proj.weight.clone()
    report = load_weights(model, config.output_dir, verbose=False)
    assert not torch.equal(model.patch_embed.proj.weight, before)
    assert {name for name in report.missing if not name.startswith(("head.", "fc_norm."))} == set()


@pytest.mark.parametrize("mode", ["exact", "none"])
def test_all_patches_are_counted(config, tmp_path, mode):
    masking = dataclasses.replace(config.masking, mode=mode)
    recover = {"masking": masking, "objective": ObjectiveConfig(recover="all")}
    losses, held_out = run(config, **recover)
    assert losses[0] == pytest.approx(math.log(8192), abs=0.3)
    assert held_out["other_context_loss"] > 0
    # the same from a store, where the tokens of all patches are kept
    data = dataclasses.replace(config.data, view_cycle=2)
    kept, _ = run(config, **recover, data=data, output_dir=tmp_path / "kept")
    off = dataclasses.replace(data, token_cache="off")
    assert kept == run(config, **recover, data=off, output_dir=tmp_path / "off")[0]


def test_nothing_hidden_needs_all_patches(config):
    with pytest.raises(ValueError, match=r"--objective\.recover all"):
        run(config, masking=dataclasses.replace(config.masking, mode="none"))
