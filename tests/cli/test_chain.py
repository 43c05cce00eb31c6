"""From a folder of JPEGs to a deployed model, typed as a user would type it: no architecture option is repeated."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import beit_fast
from beit_fast.models import BeitForSemanticSegmentation
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train.evaluation.knn import knn_accuracy
from benchmarks.baselines.libraries import make_torchvision_importable
from tests.cli.typed import beit
from tests.images import write_kinds

LOADING = "--data.threads 1 --device cpu --log.progress none"
ARCHITECTURE = "--model.size tiny --model.width 64 --model.depth 2 --model.num-heads 2 --model.image-size 64"
SHORT = "--batch-size 8 --batch-per-device 8"


@pytest.fixture(autouse=True)
def torchvision():
    make_torchvision_importable()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of JPEGs, under train and val: three classes of drawn scenes."""
    return write_kinds(tmp_path_factory.mktemp("images"), 14)


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """Tokenizer, pre-training with it, and fine-tuning from that."""
    root = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(root):
        assert beit(
            "train train_tokenizer --output-dir tokenizer --steps 6 --hidden-dim 16 --data.path", images / "train",
            "--optim.warmup-steps 1 --quantizer.autoencoder-steps 2", LOADING, SHORT,
        ) == 0  # fmt: skip
        assert beit(
            "train pretrain_beit_base --output-dir pretrain --steps 3 --tokenizer.name tokenizer --data.path",
            images / "train", "--masking.num-masked 6 --masking.min-num-patches 2", ARCHITECTURE, LOADING, SHORT,
            "--evaluation.knn", images,
        ) == 0  # fmt: skip
        assert beit(
            "train finetune_imagenet_base --output-dir finetune --weights pretrain --epochs 1 --data.path", images,
            "--data.num-classes 3", LOADING, SHORT,
        ) == 0  # fmt: skip
    return root


def test_every_run_opens_in_python(runs):
    assert load_tokenizer(runs / "tokenizer").vocab_size == 8192
    pretrained = beit_fast.BeitForMaskedImageModeling.from_pretrained(runs / "pretrain")
    assert pretrained.config.width == 64
    assert beit_fast.Beit.from_pretrained(runs / "pretrain").num_classes == 0
    classifier = beit_fast.Beit.from_pretrained(runs / "finetune")
    assert classifier(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    described = json.loads((runs / "pretrain" / "model" / "preprocessing.json").read_text())
    assert described["mean"] == [0.485, 0.456, 0.406]


def test_neighbours_are_measured_in_pretraining_and_by_command(runs, images, tmp_path, capsys):
    """The command gives the figure of the run's last evaluation, and so do the embedded features."""
    metrics = [json.loads(line) for line in (runs / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    top1 = next(line["knn_top1_percent"] for line in reversed(metrics) if "knn_top1_percent" in line)
    assert beit("knn", runs / "pretrain", images, "--device cpu --threads 1") == 0
    assert f"top-1 {top1:.3f} %" in capsys.readouterr().out
    features = {}
    for part in ("train", "val"):
        for suffix in (".npy", ".parquet"):
            path = tmp_path / f"{part}{suffix}"
            assert beit("embed", runs / "pretrain", images / part, path, "--device cpu --threads 1") == 0
        names = (tmp_path / f"{part}.txt").read_text().splitlines()
        values = np.load(tmp_path / f"{part}.npy")
        table = parquet.read_table(tmp_path / f"{part}.parquet")
        assert table["name"].to_pylist() == names
        np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), values)
        labels = np.array([int(Path(name).parent.name[-1]) for name in names])
        features[part] = torch.from_numpy(values), torch.from_numpy(labels)
    assert knn_accuracy(*features["train"], *features["val"], 3)[0] == pytest.approx(top1)


def test_the_classifier_is_evaluated_and_predicts(runs, images, capsys):
    assert beit("evaluate", runs / "finetune", "--data.path", images, "--data.threads 1 --device cpu") == 0
    assert "on 12 images" in capsys.readouterr().out
    image = images / "val" / "kind_1" / "1.jpg"
    assert beit("predict", runs / "finetune", "--device cpu", image) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("%")[1].strip() for line in lines if "%" in line} == {"kind_0", "kind_1", "kind_2"}
    assert beit("predict", runs / "finetune", image.parent, "--json --top 2 --device cpu") == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [Path(entry["image"]) for entry in written] == sorted(image.parent.iterdir())
    assert all(len(entry["classes"]) == 2 and 0 < entry["classes"][0]["share"] <= 1 for entry in written)
    first = next(entry for entry in written if Path(entry["image"]) == image)["classes"][0]
    assert f"{100 * first['share']:6.2f} %  {first['name']}" in "\n".join(lines)


def same_logits(expected, found):
    """1e-5 of logits that are not all zero."""
    assert float(expected.std()) > 1e-6
    assert float((expected - found).abs().max()) <= 1e-5


@pytest.fixture(scope="module")
def views(images):
    pixels = [np.asarray(Image.open(path).resize((64, 64))) for path in sorted((images / "val").rglob("*.jpg"))[:3]]
    return torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in pixels])


@pytest.mark.parametrize(
    "target", ["timm", "transformers", pytest.param("onnx", marks=pytest.mark.slow), "torch-export", "safetensors"]
)
def test_an_exported_classifier_gives_the_same_logits(runs, views, tmp_path, capsys, target):
    out = tmp_path / "exported"
    assert beit("export", runs / "finetune", out, "--to", target) == 0, capsys.readouterr().err
    assert "largest difference" in capsys.readouterr().out
    with torch.no_grad():
        expected = beit_fast.Beit.from_pretrained(runs / "finetune")(views)
        if target == "timm":
            timm = pytest.importorskip("timm")
            found = timm.create_model(f"local-dir:{out}", pretrained=True).eval()(views)
        elif target == "transformers":
            transformers = pytest.importorskip("transformers")
            peer = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
            assert peer.config.id2label[1] == "kind_1"
            found = peer(views).logits
        elif target == "onnx":
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(out / "model.onnx")
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: views.numpy()})[0])
        elif target == "torch-export":
            found = torch.export.load(out / "model.pt2").module()(views)
        else:
            found = beit_fast.Beit.from_pretrained(out)(views)
    same_logits(expected, found)


@pytest.mark.parametrize("target", ["timm", "transformers"])
def test_an_exported_pretraining_run(runs, views, tmp_path, target):
    out = tmp_path / "exported"
    assert beit("export", runs / "pretrain", out, "--to", target) == 0
    if target == "timm":
        timm = pytest.importorskip("timm")
        features = timm.create_model(f"local-dir:{out}", pretrained=True).eval().forward_features(views)
        assert features.shape == (3, 17, 64)


def test_an_export_that_differs_is_refused(runs, tmp_path, monkeypatch, capsys):
    from beit_fast.cli import export

    def shifted(model, to, folder, images, preprocessing):
        folder.mkdir()
        return 1.0, 2.0

    monkeypatch.setattr(export, "compared", shifted)
    assert beit("export", runs / "finetune", tmp_path / "out", "--to timm") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pretraining_run_is_named_where_a_classifier_is_expected(runs, images, capsys):
    assert beit("predict", runs / "pretrain", images / "val" / "kind_1" / "1.jpg") == 1
    error = capsys.readouterr().err
    assert "fine-tune it first: beit-fast train finetune_imagenet_base --weights" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train pretrain_beit_bas", "did you mean pretrain_beit_base?"),
        ("trian x", "unknown command 'trian'; did you mean train?"),
        ("train pretrain_beit_base --data.path /nope --tokenizer.name /nowhere", "/nope"),
        ("train finetune_imagenet_base --weights /nope", "/nope: no such file or folder"),
        ("predict /nope x.jpg", "/nope: no such file or folder"),
        ("predict --device cpu", "predict takes a checkpoint and images"),
        ("export /nope /tmp/nowhere --to timn", "timn"),
        ("embed /nope /nope features.csv", "features.npy (or .parquet)"),
        ("knn /nope", "knn takes a model and labelled images"),
        ("train pretrain_tiny_builtin --device tpu9", "device 'tpu9' is not one of"),
    ],
)
def test_likely_mistakes_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert beit(words) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_segmentation_from_the_same_pretraining(runs, tmp_path, capsys):
    """Crops of 64 pixels are a choice of the data; the architecture comes with the weights."""
    words = (
        "--steps 1 --batch-size 2 --batch-per-device 2 --optim.warmup-steps 1 --model.image-size 64 --crops.base 128 64"
    )
    words += " --model.image-size 64 --crops.base 128 64"
    data = "--data.builtin-images 4 --data.builtin-validation-images 1 --data.builtin-size 64 --data.num-classes None"
    assert beit(
        "train segment_ade20k_base --weights", runs / "pretrain", "--output-dir", tmp_path / "segment", words, data,
        "--model.channels 8 --data.cache-dir", tmp_path, LOADING,
    ) == 0, capsys.readouterr().err  # fmt: skip
    model = BeitForSemanticSegmentation.from_pretrained(tmp_path / "segment")
    assert model.config.backbone.width == 64
    metrics = [json.loads(line) for line in (tmp_path / "segment" / "metrics.jsonl").read_text().splitlines()]
    iou = next(line["mean_iou_percent"] for line in reversed(metrics) if "mean_iou_percent" in line)
    capsys.readouterr()
    scenes = "--data.builtin-images 1 --data.builtin-size 64 --data.threads 1 --device cpu --data.cache-dir"
    assert beit("evaluate", tmp_path / "segment", scenes, tmp_path) == 0
    assert f"mIoU {iou:.3f} %" in capsys.readouterr().out
    assert beit("evaluate", tmp_path / "segment", "--ratios 1 1.5 --flip", scenes, tmp_path) == 0
    assert "ratios 1.0 1.5, flipped too" in capsys.readouterr().out
    assert beit("export", tmp_path / "segment", tmp_path / "out", "--to torch-export") == 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        same_logits(model.predict(x), torch.export.load(tmp_path / "out" / "model.pt2").module()(x))
    assert beit("export", tmp_path / "segment", tmp_path / "no", "--to timm") == 1
    assert "timm has no segmentation models" in capsys.readouterr().err
