"""`evaluate` and `predict` on our, timm's, transformers' and official files of one classifier."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from beit_fast.cli.evaluate import evaluate_command
from beit_fast.cli.predict import predict_command
from beit_fast.data.builtin import render_labelled
from beit_fast.models import Beit, BeitConfig, convert_state_dict
from beit_fast.train.evaluation.classifiers import architecture_of, open_classifier

PLUS = BeitConfig.from_preset(
    "tiny", "plus", width=128, depth=2, num_heads=2, image_size=32, patch_size=8, init_std=0.3
)
PLAIN = BeitConfig.from_preset("tiny", "plain", width=128, depth=2, num_heads=2, image_size=32, patch_size=8)
CLASSES = [f"class {number}" for number in range(24)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Beit(PLUS.for_classification(24)).eval()
    with torch.no_grad():
        model.head.weight.mul_(1000)
        for block in model.blocks:
            block.attn.relative_position_bias_table.normal_()
    return model


def written(model, folder, kind):
    """The same classifier as each library would save it; returns the path to name."""
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if kind == "run":
        model.save_pretrained(folder / "model")
        about = {"classes": CLASSES, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_share": 0.875}
        (folder / "model" / "preprocessing.json").write_text(json.dumps(about))
        return folder
    if kind == "official":
        torch.save({"model": state, "epoch": 3}, folder / "official.pth")
        return folder / "official.pth"
    if kind == "timm":
        save_file(convert_state_dict(state, to="timm"), folder / "timm.safetensors")
        return folder / "timm.safetensors"
    hugging_face = convert_state_dict(state, to="transformers_v4" if kind == "hub" else "transformers")
    if kind == "transformers":
        save_file(hugging_face, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    torch.save(hugging_face, folder / "pytorch_model.bin")
    config = {
        "model_type": "beit", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True,
        "use_mean_pooling": True, "layer_norm_eps": 1e-6, "id2label": {str(n): c for n, c in enumerate(CLASSES)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for index in range(40):
        pixels, label = render_labelled(index, 11, 48)
        folder = root / "val" / f"{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    for label in range(24):  # every class exists, so that folders are numbered as the outputs are
        (root / "val" / f"{label:02d}").mkdir(exist_ok=True)
        pixels, _ = render_labelled(1000 + label, 11, 48)
        Image.fromarray(pixels).save(root / "val" / f"{label:02d}" / "extra.png")
    return root


KINDS = ("run", "official", "timm", "transformers", "hub")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_accuracy(model, scenes, tmp_path, capsys, kind):
    path = written(model, tmp_path / "x", kind)
    arguments = [str(path), "--data.path", str(scenes), "--data.threads", "1", "--device", "cpu", "--output-dir",
                 str(tmp_path / "out")]  # fmt: skip
    assert evaluate_command(arguments) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "top-1" in line)
    views = []
    labels = []
    for folder in sorted((scenes / "val").iterdir()):
        for file in folder.iterdir():
            image = Image.open(file).resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
            views.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1)
            labels.append(int(folder.name))
    with torch.no_grad():
        hits = model(torch.stack(views)).argmax(1) == torch.tensor(labels)
    assert f"top-1 {100 * hits.float().mean():.3f} %" in line
    assert "on 64 images" in line
    assert (tmp_path / "out" / "per_class.tsv").exists()


@pytest.mark.parametrize(
    "config",
    [
        PLUS.for_classification(24),
        PLAIN.for_classification(10, global_pool="token"),
        PLUS.for_classification(7, relative_position_bias="shared", layer_scale_init=None),
        PLUS.for_classification(7, image_size=48, patch_size=16, mlp_ratio=2.0, use_abs_pos_emb=True),
    ],
)
def test_the_architecture_is_read_off_the_tensors(config):
    found = architecture_of(Beit(config).state_dict(), "x")
    same = ("image_size", "patch_size", "width", "depth", "num_heads", "mlp_ratio", "use_abs_pos_emb",
            "relative_position_bias", "num_classes", "global_pool")  # fmt: skip
    assert {n: getattr(found, n) for n in same} == {n: getattr(config, n) for n in same}
    assert (found.layer_scale_init is None) == (config.layer_scale_init is None)


def test_another_size_resizes_the_tables(model, tmp_path):
    found = open_classifier(written(model, tmp_path / "x", "timm"), image_size=64)
    assert found.image_size == 64
    assert found.model.config.grid == (8, 8)
    assert found.classes[23] == "23"


@pytest.mark.parametrize("kind", ["run", "hub"])
def test_predict_names_five_classes(model, scenes, tmp_path, capsys, kind):
    path = written(model, tmp_path / "x", kind)
    capsys.readouterr()
    image = sorted((scenes / "val" / "03").iterdir())[0]
    assert predict_command([str(path), str(image), "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tensors loaded" not in line]
    lines = lines[lines.index(str(image)) :]
    view = Image.open(image).resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
    pixels = torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1).float() / 127.5 - 1
    with torch.no_grad():
        shares, numbers = model(pixels[None]).softmax(-1)[0].topk(5)
    assert [line.split("%")[1].strip() for line in lines[1:6]] == [CLASSES[n] for n in numbers]
    assert float(lines[1].split("%")[0]) == pytest.approx(100 * float(shares[0]), abs=0.6)


def test_predict_goes_on_after_a_bad_image(model, tmp_path, capsys):
    path = written(model, tmp_path / "x", "run")
    pixels, _ = render_labelled(0, 0, 40)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    images = [str(tmp_path / name) for name in ("missing.jpg", "bad.jpg", "good.png")]
    assert predict_command([str(path), *images, "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("%") == 5
    assert [line.split(": ", 2)[2] for line in captured.err.splitlines()] == [
        "cannot be read: No such file or directory",
        "unknown format (starts with 6e 6f 74 68)",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "evaluate takes one checkpoint"),
        (["nothing.pth"], 1, "nothing.pth: no such file or folder"),
        (["BACKBONE"], 1, "holds no classifier"),
        (["CLASSIFIER", "--data.path", "nowhere"], 1, "no such folder: nowhere"),
        (["CLASSIFIER", "--data.path", "TWO"], 1, "2 of 2 classes do not occur in training"),
        (["CLASSIFIER", "--crop-share", "2"], 1, "--crop-share must be in"),
        (["CLASSIFIER", "--batch-sise", "2"], 2, "did you mean --batch-size"),
        (["RUN"], 1, "this run has not finished and left no classifier"),
    ],
)
def test_what_cannot_work_is_one_line(model, tmp_path, capsys, arguments, code, message):
    classifier = written(model, tmp_path / "x", "timm")
    headless = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    save_file(headless, tmp_path / "backbone.safetensors")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("ant", "bee"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "two" / name / "1.png")
    places = {"CLASSIFIER": classifier, "BACKBONE": tmp_path / "backbone.safetensors", "TWO": tmp_path / "two",
              "RUN": tmp_path / "run"}  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        evaluate_command([str(places.get(word, word)) for word in arguments])
    assert done.value.code == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_the_program_knows_both_commands():
    done = subprocess.run([sys.executable, "-m", "beit_fast", "--help"], capture_output=True, text=True)
    assert "evaluate CHECKPOINT" in done.stdout
    assert "predict CHECKPOINT IMAGE" in done.stdout


def test_a_smaller_set_of_the_same_names_is_numbered_by_name(model, tmp_path, capsys):
    path = written(model, tmp_path / "x", "run")
    for name in ("class 7", "class 20"):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "few" / name / "1.png")
    assert evaluate_command([str(path), "--data.path", str(tmp_path / "few"), "--output-dir", str(tmp_path / "o")]) == 0
    rows = (tmp_path / "o" / "per_class.tsv").read_text().splitlines()[1:]
    assert sorted(row.split("\t")[0] for row in rows) == ["class 20", "class 7"]
