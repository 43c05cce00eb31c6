"""`--weights`: what a run, a file or a folder says of the model that takes it, and what contradicts it."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from beit_fast.cli.options import typed_options
from beit_fast.cli.train import main
from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, convert_state_dict
from beit_fast.train.config import LogConfig, OptimConfig, to_plain
from beit_fast.train.tasks.finetune import ClassifierModelConfig, Finetune, FinetuneConfig, LabelledDataConfig
from beit_fast.train.tasks.pretrain import (
    DataConfig,
    MaskedImageModeling,
    MaskingConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
)
from beit_fast.train.tasks.weights import describe_weights, load_weights, with_weights

TINY = ModelConfig(
    size="tiny", width=32, depth=2, num_heads=2, image_size=32, patch_size=8, use_abs_pos_emb=True,
    layer_scale_init=0.0, drop_path_rate=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished pre-training run of three steps that keeps averaged weights."""
    folder = tmp_path_factory.mktemp("pretrain")
    config = PretrainConfig(
        output_dir=folder / "run", steps=3, batch_size=4, batch_per_device=4, model=TINY, device="cpu",
        data=DataConfig(builtin_images=8, builtin_size=32, normalization="half", threads=1, cache_dir=str(folder)),
        masking=MaskingConfig(num_masked=6, min_num_patches=2), tokenizer=TokenizerConfig(name="demo"),
        optim=OptimConfig(lr=1e-2, warmup_steps=1, ema_decay=0.5), log=LogConfig(progress="none"),
    )  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(config, MaskedImageModeling, demo=False, arguments=[])
    assert not done.value.code
    return config.output_dir


def recipe(weights, **values):
    return FinetuneConfig(weights=str(weights), data=LabelledDataConfig(), model=ClassifierModelConfig(), **values)


def test_a_run_brings_architecture_size_and_normalisation(run):
    config = with_weights(recipe(run), set())
    model = config.model
    assert (model.width, model.depth, model.num_heads, model.patch_size, model.image_size) == (32, 2, 2, 8, 32)
    assert (model.use_abs_pos_emb, model.layer_scale_init) == (True, 0.0)
    assert config.data.normalization == "half"
    assert model.drop_path_rate == 0.1  # the recipe's own
    report = load_weights(Beit(model.classifier(3)), run, verbose=False)
    assert set(report.missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


def test_an_image_size_that_the_recipe_or_the_user_sets_stays(run):
    set_by_recipe = dataclasses.replace(recipe(run), model=ClassifierModelConfig(image_size=384))
    assert with_weights(set_by_recipe, set()).model.image_size == 384
    assert with_weights(recipe(run), {"model.image_size"}).model.image_size == 224


def test_averaged_weights_are_taken(run):
    (checkpoint,) = (run / "checkpoints").iterdir()
    averaged, last = (load_file(checkpoint / f"{name}.safetensors") for name in ("ema", "model"))
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(averaged[key], last[key])
    model = Beit(with_weights(recipe(run), set()).model.classifier(3))
    load_weights(model, run, verbose=False)
    assert torch.equal(model.state_dict()[key], averaged[key])


def test_contradictions_are_named_all_at_once(run, tmp_path, capsys):
    words = "--model.size large --model.width 64 --data.normalization imagenet --model.patch-size=8 --device cpu"
    arguments = [*words.split(), "--weights", str(run), "--output-dir", str(tmp_path / "ft")]
    with pytest.raises(SystemExit) as done:
        main(recipe(run), Finetune, demo=False, arguments=arguments)
    assert done.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--model.size large (there: tiny), --model.width 64 (there: 32), --data.normalization imagenet" in error
    assert "patch" not in error.split("contradict")[1].replace(str(run), "")
    assert not (tmp_path / "ft").exists()


def test_fine_tuning_from_a_run_repeats_no_option(run, tmp_path, capsys):
    words = (
        "--data.builtin-images 16 --data.builtin-size 32 --data.builtin-validation-images 8 --steps 2 --batch-size 4 "
        "--batch-per-device 4 --optim.warmup-steps 1 --device cpu"
    )
    folders = ["--data.cache-dir", str(tmp_path), "--output-dir", str(tmp_path / "ft")]
    arguments = [*words.split(), "--weights", str(run), *folders]
    with pytest.raises(SystemExit) as done:
        main(recipe(run), Finetune, demo=False, arguments=arguments)
    assert not done.value.code, capsys.readouterr().err
    saved = json.loads((tmp_path / "ft" / "config.json").read_text())["config"]
    assert (saved["model"]["width"], saved["model"]["image_size"], saved["data"]["normalization"]) == (32, 32, "half")
    described = describe_weights(tmp_path / "ft")
    assert described.model == {key: to_plain(TINY)[key] for key in described.model}


@pytest.mark.parametrize("kind", ["file", "transformers", "folder"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {"size": "tiny", "preset": "plus", "width": None, "image_size": 64, "patch_size": 16}),
        ({"width": 128, "num_heads": 2, "depth": 3, "layer_scale_init": None},
         {"size": "base", "width": 128, "depth": 3, "num_heads": 2, "layer_scale_init": 0.0}),
    ],
)  # fmt: skip
def test_files_describe_themselves(tmp_path, kind, overrides, expected):
    config = BeitConfig.from_preset("tiny", "plus", image_size=64, **overrides)
    model = Beit(config.for_classification(5))
    path = tmp_path / "weights.safetensors"
    if kind == "folder":
        path = tmp_path / "model"
        model.save_pretrained(path)
        (path / "preprocessing.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    else:
        state = model.state_dict()
        save_file(convert_state_dict(state, to="transformers") if kind == "transformers" else state, path)
    found = describe_weights(path)
    assert {key: found.model[key] for key in expected} == expected
    assert found.normalization == ("half" if kind == "folder" else None)
    made = ClassifierModelConfig(**found.model).classifier(5)
    assert {k: v.shape for k, v in Beit(made).state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_what_cannot_be_described_is_one_line(tmp_path):
    odd = BeitForMaskedImageModeling(BeitConfig.from_preset("tiny", mlp_ratio=2.0, image_size=32))
    save_file(odd.state_dict(), tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="MLP ratio 2"):
        describe_weights(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="no such file or folder"):
        describe_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no weights are published as 'beit_tiny_patch16_224'"):
        describe_weights("beit_tiny_patch16_224")


def test_typed_options_are_the_fields_that_a_command_line_sets():
    words = ["--model.image_size", "64", "--fresh", "--data.no-validate", "--optim.lr=1", "--weights", "--x"]
    typed = typed_options(recipe("x"), words)
    assert typed == {"model.image_size", "fresh", "data.validate", "optim.lr", "weights"}
