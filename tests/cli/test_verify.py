"""`beit-fast verify` on look-alikes of the released files, and whether the published tables are all there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.cli.main import main
from beit_fast.models import Beit, BeitConfig, BeitForSemanticSegmentation
from beit_fast.models.segmentation import segmentation_config
from beit_fast.tokenizers import load_tokenizer
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder
from beit_fast.train.evaluation.published import PUBLISHED

SMALL = BeitConfig.from_preset("base", width=32, depth=2, num_heads=2, patch_size=16).for_classification(3)
FAST = ["--device", "cpu", "--data.threads", "1"]


def verify(*words):
    try:
        return main(["verify", *map(str, words), *FAST])
    except SystemExit as done:
        return done.code or 0


@pytest.fixture
def images(tmp_path):
    """Four images in each of three folders whose names say nothing to the model, as those of ImageNet."""
    random = np.random.default_rng(0)
    for kind in ("n01440764", "n01443537", "n01484850"):
        folder = tmp_path / "val" / kind
        folder.mkdir(parents=True)
        for index in range(4):
            Image.fromarray(random.integers(0, 255, (60, 50 + index, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "val"


def test_a_classifier_by_its_official_file(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = Beit(SMALL).eval()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # always the second class: 4 of 12
    torch.save({"model": model.state_dict()}, "released.pth")
    name = "beit_base_patch16_224_pt22k_ft22kto1k"
    assert verify(name, "--weights", "released.pth", "--data.path", images) == 0
    out = capsys.readouterr().out
    assert "top1_percent             published 85.2, measured 33.3333, difference -51.8667" in out
    assert "top5_percent             published 97.6, measured 100.0000" in out
    assert "loaded" in out
    record = json.loads((tmp_path / f"verify_{name}.json").read_text())
    assert record["published"] == {"top1_percent": 85.2, "top5_percent": 97.6}
    assert record["measured"]["top1_percent"] == pytest.approx(100 / 3)
    assert record["images"] == 12
    assert f"released.pth: sha256 {record['sha256']['released.pth']}" in out
    assert len(record["sha256"]["released.pth"]) == 64


@pytest.mark.parametrize(
    "name", ["upernet_beit_base_640", pytest.param("upernet_beit_base_640_ms", marks=pytest.mark.slow)]
)
def test_a_segmentation_model(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part, values in (("images", 255), ("annotations", 4)):
        (tmp_path / "ade" / part / "validation").mkdir(parents=True)
        for index in range(2):
            shape = (40, 48, 3) if part == "images" else (40, 48)
            suffix = "jpg" if part == "images" else "png"
            picture = Image.fromarray(random.integers(0, values, shape, dtype=np.uint8))
            picture.save(tmp_path / "ade" / part / "validation" / f"{index}.{suffix}")
    (tmp_path / "ade" / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky\n3\ttree\n")
    backbone = BeitConfig.from_preset("base", width=32, depth=4, num_heads=2, patch_size=16, image_size=64)
    config = segmentation_config(backbone, 3, channels=8, auxiliary_channels=8)
    torch.save({"state_dict": BeitForSemanticSegmentation(config).state_dict()}, "upernet.pth")
    assert verify(name, "--weights", "upernet.pth", "--data.path", tmp_path / "ade") == 0, capsys.readouterr().err
    record = json.loads((tmp_path / f"verify_{name}.json").read_text())
    assert record["published"] == PUBLISHED[name].metrics
    assert all(0 <= record["measured"][metric] <= 100 for metric in record["published"])
    assert record["images"] == 2


def test_a_tokenizer(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert verify("dalle", "--weights", "demo", "--data.path", images) == 0
    assert "mae                      published 0.0856, measured 0." in capsys.readouterr().out
    record = json.loads((tmp_path / "verify_dalle.json").read_text())
    assert record["sha256"] == {"demo": load_tokenizer("demo").sha256}
    assert 0 < record["measured"]["mae"] < 1


def test_a_probe_by_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    values = {"best_top1_percent": 50.0, "best_layer": 8, "validation_images": 12.0}
    (tmp_path / "run" / "complete.json").write_text(json.dumps({"metrics": values}))
    assert verify("linear_probe_base", "--weights", "run") == 0
    assert "published 56.7, measured 50.0000, difference -6.7000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beit_base_patch16_224_in1k", "--data.path", "."], "no weights are released for beit_base_patch16_224_in1k"),
        (["dale"], "did you mean dalle?"),
        (["dalle"], "--data.path is missing"),
        (["linear_probe_base", "--weights", "nowhere"], "nowhere is no finished run of linear_probe"),
        (["upernet_beit_base_640", "--weights", "nowhere", "--data.path", "."], "nowhere"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert verify(*words) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_every_published_result_is_listed(capsys):
    """Of the paper's tables: 1 and 6 (ImageNet), 3, 4, 5, 7 and 10 (ADE20K and ablations), 8, 9, 11."""
    assert main(["verify"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PUBLISHED)
    sources = " ".join(entry.source for entry in PUBLISHED.values())
    assert {number for number in range(1, 12) if f"table {number}" in sources} == {1, 3, 4, 5, 6, 7, 8, 9, 10, 11}
    ablations = [entry.metrics for name, entry in PUBLISHED.items() if entry.source.startswith("table 4")]
    assert sorted(metrics.get("top1_percent", 0) for metrics in ablations)[7:] == [
        80.50, 81.04, 81.67, 82.59, 82.77, 82.86, 83.19,
    ]  # fmt: skip
    assert sorted(metrics.get("mean_iou_percent", 0) for metrics in ablations)[7:] == [
        36.73, 37.09, 40.93, 41.38, 42.93, 44.65, 45.58,
    ]  # fmt: skip


@pytest.mark.slow
def test_look_alikes_of_the_released_shapes(images, tmp_path, monkeypatch):
    """Every released classifier at its own size, and DALL-E's tokenizer; random weights, so only the way is tested."""
    monkeypatch.chdir(tmp_path)
    for name, entry in PUBLISHED.items():
        if entry.kind == "classifier" and entry.normalization == "half" and "384" not in name and "512" not in name:
            size = name.split("_")[1]
            config = BeitConfig.from_preset(size).for_classification(1000)
            torch.save({"model": Beit(config).state_dict()}, f"{name}.pth")
            data = tmp_path / "numbers" / "val"
            if not data.exists():
                for number, folder in enumerate(sorted(images.iterdir())):
                    (data / str(number)).mkdir(parents=True)
                    for path in sorted(folder.iterdir())[:1]:
                        (data / str(number) / path.name).write_bytes(path.read_bytes())
            assert verify(name, "--weights", f"{name}.pth", "--data.path", data) == 0
    (tmp_path / "dalle").mkdir()
    torch.save(DalleEncoder().state_dict(), tmp_path / "dalle" / "encoder.pth")
    torch.save(DalleDecoder().state_dict(), tmp_path / "dalle" / "decoder.pth")
    assert verify("dalle", "--weights", tmp_path / "dalle", "--data.path", images) == 0
