"""The commands for pictures, on runs, files and images as they are on disk."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from beit_fast.cli.main import main
from beit_fast.cli.pictures import open_backbone, open_pretraining
from beit_fast.data.builtin import render_labelled
from beit_fast.data.loader import Request
from beit_fast.models import Beit, BeitConfig, convert_state_dict
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig, from_plain, to_plain
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
from beit_fast.visualize.reconstructions import guesses, reconstruct
from benchmarks.evidence import protocol


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(12):
        Image.fromarray(render_labelled(index, 5, 48)[0]).save(folder / f"{index:03d}.png")
    return folder


def config_of(folder, images, **changes):
    return PretrainConfig(
        output_dir=folder,
        steps=4,
        eval_every=2,
        batch_size=6,
        batch_per_device=6,
        data=DataConfig(path=str(images), normalization="half", threads=1),
        model=ModelConfig(width=32, depth=2, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.0),
        masking=MaskingConfig(num_masked=6, min_num_patches=2),
        tokenizer=TokenizerConfig(name="demo"),
        evaluation=EvaluationConfig(images=8, path=str(images), pictures=2),
        optim=OptimConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=4),
        log=LogConfig(every_steps=1, progress="none"),
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """Two pre-trained runs: visual tokens, and pixels."""
    root = tmp_path_factory.mktemp("runs")
    for name, target in (("tokens", "visual_tokens"), ("pixels", "pixels")):
        config = config_of(root / name, images, objective=ObjectiveConfig(target=target))
        engine.run(MaskedImageModeling(config))
    return root


def test_a_run_leaves_pictures_at_every_evaluation(runs):
    names = sorted(path.name for path in (runs / "tokens" / "pictures").iterdir())
    kinds = [f"{kind}_step_0000000{step}.png" for kind in ("attention", "reconstructions") for step in (2, 4)]
    assert names == [*kinds, "token_histogram.json"]
    assert all(np.asarray(Image.open(runs / "tokens" / "pictures" / name)).std() > 5 for name in kinds)
    page = (runs / "tokens" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert sorted(path.name for path in (runs / "pixels" / "pictures").iterdir()) == kinds[:2]


def test_pictures_leave_the_run_as_it_is(runs, images, weights, tmp_path):
    config = config_of(tmp_path / "bare", images)
    config = dataclasses.replace(config, evaluation=EvaluationConfig(), eval_every=None)
    engine.run(MaskedImageModeling(config))
    assert weights(tmp_path / "bare") == weights(runs / "tokens")


def test_the_configuration_of_a_run_comes_back(tmp_path, images):
    config = config_of(tmp_path / "run", images, seed=3)
    assert from_plain(PretrainConfig, to_plain(config)) == config
    with pytest.raises(TypeError, match="unknown"):
        from_plain(PretrainConfig, {"unknown": 1})


def test_reconstructions(runs, tmp_path, capsys):
    output = tmp_path / "new" / "sheet.png"
    command = ["visualize", "reconstructions", str(runs / "tokens"), "--images", "10", "--pictures", "3"]
    assert main([*command, "--output", str(output), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "masked patches of 10 held-out images" in text
    assert re.search(r"true tokens +0\.\d{4} +100\.00 %", text)
    assert {line.split()[0] for line in text.splitlines()[1:5]} == {"true", "predicted", "random", "mode"}
    assert Image.open(output).height > 3 * 96
    with pytest.raises(SystemExit):
        main(["visualize", "reconstructions", str(runs / "pixels"), "--device", "cpu"])
    assert "predicts pixels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["visualize", "reconstructions", str(tmp_path)])
    assert "not a run folder of pre-training" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "timm", "headless"])
def test_attention(runs, images, tmp_path, capsys, kind):
    """Of a run in pre-training, of a classifier, and of weights without a head."""
    place = runs / "tokens"
    if kind != "run":
        torch.manual_seed(0)
        plain = BeitConfig.from_preset("tiny", "plain", width=128, depth=2, num_heads=2, image_size=32, patch_size=8)
        model = Beit(plain.for_classification(3 if kind == "timm" else 0, global_pool="token"))
        place = tmp_path / "weights.safetensors"
        state = convert_state_dict(model.state_dict(), to="timm")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, place)
        opened, mean, _ = open_backbone(str(place), "cpu")
        assert torch.equal(opened.patch_embed.proj.weight, model.patch_embed.proj.weight)
        assert mean.flatten().tolist() == [0.5] * 3
    command = ["visualize", "attention", str(place), str(images / "000.png"), str(images / "001.png")]
    command += ["--query", "1", "4", "--image-size", "48", "--block", "0", "--device", "cpu"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert "patch (1, 4) of 6x6, block 0" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000", "001"}
    assert Image.open(tmp_path / "out" / "000" / "attn-head1.png").size == (48, 48)
    assert (tmp_path / "out" / "000" / "sheet.png").exists()


def test_tokens(images, tmp_path, capsys):
    command = ["tokens", str(images / "003.png"), "--size", "32", "--output-dir", str(tmp_path)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    picture = torch.from_numpy(np.array(Image.open(images / "003.png"))).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(picture, size=(32, 32), mode="bicubic", antialias=True).float() / 255
    expected = load_tokenizer("demo").encode(image)[0].tolist()
    assert [[int(token) for token in line.split()] for line in lines[1:5]] == expected
    assert np.asarray(Image.open(tmp_path / "003_tokens.png")).std() > 20
    with pytest.raises(SystemExit):
        main(["tokens", str(tmp_path / "missing.png")])
    assert "missing.png: cannot be read: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tokens", str(images / "003.png"), "--size", "30"])
    assert "multiples of 8" in capsys.readouterr().err


def test_codes(tmp_path, capsys):
    output = tmp_path / "codes.png"
    assert main(["visualize", "codes", "demo", "--images", "4", "--count", "64", "--output", str(output)]) == 0
    assert re.search(r"perplexity \d+, \d+ codes used on 4 built-in images", capsys.readouterr().out)
    assert Image.open(output).size == (32 * 25 - 1, 2 * 25 - 1)


def test_report_and_comparison(runs, tmp_path, capsys):
    assert main(["report", str(runs / "tokens")]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    page = tmp_path / "both.html"
    assert main(["compare", str(runs / "tokens"), str(runs / "pixels"), "--output", str(page)]) == 0
    assert "objective.target" in page.read_text()
    for command in (["report", str(tmp_path)], ["compare", str(runs / "tokens"), str(tmp_path)]):
        with pytest.raises(SystemExit):
            main(command)
        assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report"], ["compare", "x"], ["visualize"], ["visualize", "codes"], ["tokens"]])
def test_missing_words_are_asked_for(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_predicted_tokens_of_scenes_beat_random_ones_and_the_mode(tmp_path):
    """The margin that the README states for 1,500 steps, with room for a fifth of them (three minutes of a core)."""
    study = protocol.Protocol(
        output=tmp_path, pretrain_steps=300, unlabelled_images=4000, held_out=200, cache_dir=str(tmp_path),
        precision="fp32", device="cpu",
    )  # fmt: skip
    config = protocol.pretraining(study, protocol.BASE, 0)
    engine.run(MaskedImageModeling(config))
    task, trained = open_pretraining(config.output_dir, "cpu", images=200)
    try:
        parts = []
        for start in range(0, 200, 40):
            batch = next(iter(task.held_out.batches([Request(0, np.arange(start, start + 40))])))
            parts.append(reconstruct(trained, task.tokenizer, batch.images, batch.token_images, batch.mask))
        found = guesses(parts, task.tokenizer)
    finally:
        task.close()
    for other in ("random", "mode"):
        assert found["predicted"].mean_absolute_error < 0.85 * found[other].mean_absolute_error, found
        assert found["predicted"].accuracy > 2 * found[other].accuracy, found
    assert found["true"].mean_absolute_error < 0.6 * found["predicted"].mean_absolute_error
