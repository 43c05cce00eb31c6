"""From a folder of 16-bit scans to features and files of another library, as docs/own-images.md types it.

The same run from parquet, zip and shards behind a server that loses connections sees the same bits.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import beit_fast
from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.data import BlockwiseMasking, CropSampler, PretrainLoader, Request, open_source
from beit_fast.data.sources import files as files_module
from beit_fast.train.evaluation.knn import knn_accuracy
from beit_fast.train.metrics import read_metrics
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from tests.cli.typed import beit
from tests.data.flaky_server import serving
from tests.images import scan, write_scans

SHORT = (
    "--batch-size 8 --batch-per-device 8 --tokenizer.name demo --data.threads 1 --device cpu --log.progress none "
    "--log.every-steps 1"
)
TRAIN = "train pretrain_own_images --data.channels 1"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """200 grey scans of 16 bits (D), labelled ones, weights as the official code writes them, and the scans packed."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    write_scans(root, "D", 200, 8, 5, rng, lambda label, rng: scan(label, rng, (44, 52), 30_000, 12_000, 2000))
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(BeitConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=2))
    torch.save({"model": model.state_dict()}, root / "W.pth")
    files = [(path.name, path.read_bytes()) for path in sorted((root / "D").iterdir())]
    for form in ("parquet", "zip", "served"):
        (root / form).mkdir()
    rows = [{"bytes": data, "path": name} for name, data in files]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows[:120]}), root / "parquet/train-0.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": rows[120:]}), root / "parquet/train-1.parquet")
    with zipfile.ZipFile(root / "zip/scans.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(name, data)
    for shard in range(4):
        with tarfile.open(root / f"served/scans-{shard}.tar", "w") as archive:
            for name, data in files[50 * shard : 50 * shard + 50]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return root


@pytest.fixture(autouse=True)
def elsewhere(root, monkeypatch):
    make_torchvision_importable()
    monkeypatch.setenv("BEIT_FAST_CACHE", str(root / "cache"))
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds: None)
    with contextlib.chdir(root):
        yield


@pytest.fixture(scope="module")
def run(root):
    """The run of the page, three steps of it."""
    with contextlib.chdir(root):
        assert beit("stats D --channels 1 --output stats.json --threads 1") == 0
        assert beit(
            TRAIN, "--weights W.pth --data.path D --evaluation.knn labelled --eval-every 1 --steps 3 --output-dir run",
            "--data.normalization stats.json", SHORT,
        ) == 0  # fmt: skip
    return root / "run"


def test_the_report_draws_the_neighbours_with_their_start(run):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    report = (run / "report.html").read_text()
    assert "k-NN and linear probe on labelled images" in report
    for metric in ("knn", "probe"):
        assert f"{metric} top1 percent, starting weights" in report
    stats = json.loads(Path("stats.json").read_text())
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("D").iterdir())]) / 65535
    np.testing.assert_allclose((stats["mean"][0], stats["std"][0]), (pixels.mean(), pixels.std()), rtol=1e-9)
    described = json.loads((run / "model/preprocessing.json").read_text())
    assert (described["mean"], described["channels"]) == (stats["mean"], 1)


def test_features_are_those_the_run_measured(run, tmp_path):
    sets = {}
    for part in ("train", "val"):
        assert beit("embed run", f"labelled/{part}", tmp_path / f"{part}.npy", "--device cpu --threads 1") == 0
        names = (tmp_path / f"{part}.txt").read_text().splitlines()
        labels = torch.tensor([int(Path(name).parent.name == "b") for name in names])
        sets[part] = torch.from_numpy(np.load(tmp_path / f"{part}.npy")), labels
    measured = [line["knn_top1_percent"] for line in read_metrics(run / "metrics.jsonl") if "knn_top1_percent" in line]
    assert knn_accuracy(*sets["train"], *sets["val"], 2)[0] == pytest.approx(measured[-1])


def test_the_export_gives_equal_logits(run, tmp_path, capsys):
    assert beit("export run", tmp_path / "out", "--to safetensors") == 0
    assert "largest difference 0.0e+00" in capsys.readouterr().out
    ours, theirs = (BeitForMaskedImageModeling.from_pretrained(path) for path in (run, tmp_path / "out"))
    images, mask = torch.randn(3, 1, 32, 32), torch.ones(3, 16, dtype=torch.bool)
    assert torch.equal(ours.predict_tokens(images, mask), theirs.predict_tokens(images, mask))
    assert beit_fast.Beit.from_pretrained(run)(images).shape[0] == 3


def batches(source):
    masking, sampler = BlockwiseMasking((4, 4), 6, min_num_patches=1), CropSampler()
    with PretrainLoader(
        source, masking, sampler, seed=0, image_size=32, token_image_size=32, channels=1, mean=(0.5,), std=(0.5,),
        threads=1,
    ) as loader:  # fmt: skip
        return list(loader.batches(Request(0, np.arange(start, start + 40)) for start in range(0, 200, 40)))


def same(left, right):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("images", "token_images", "mask", "indices", "sample_keys")
    )


@pytest.mark.parametrize("form", ["parquet", "zip", "served"])
def test_every_form_gives_the_bits_of_the_folder(root, form):
    expected = batches(open_source("D"))
    if form != "served":
        assert same(batches(open_source(form)), expected)
        return
    with serving(root / "served") as server:
        server.drop_every = 10
        assert same(batches(open_source(f"{server.url}/scans-{{0..3}}.tar")), expected)
        assert server.answers > 200


def weights(run):
    return BeitForMaskedImageModeling.from_pretrained(run).state_dict()


@pytest.mark.parametrize("form", [pytest.param("zip", marks=pytest.mark.slow), "served"])
def test_a_run_that_was_stopped_goes_on_to_the_weights_of_the_folder(root, form, tmp_path):
    common = f"{TRAIN} --weights W.pth --steps 4 --checkpoint.every-steps 2 {SHORT}"
    if not (root / "whole/model").is_dir():
        assert beit(common, "--data.path D --output-dir whole") == 0
    with serving(root / "served") as server:
        server.drop_every = 10
        path = form if form == "zip" else f"{server.url}/scans-{{0..3}}.tar"
        assert beit(common, "--max-steps 2 --output-dir", tmp_path / "run", "--data.path", path) == 0
        assert beit(common, "--output-dir", tmp_path / "run", "--data.path", path) == 0
    expected, found = weights(root / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "zip", "served"])
def test_a_killed_run_goes_on_to_the_weights_of_the_folder(root, form, tmp_path):
    common = f"{TRAIN} --weights W.pth --steps 60 --checkpoint.every-steps 5 {SHORT}".split()
    command = [sys.executable, "-m", "beit_fast", *common]
    folder = [*command, "--data.path", "D", "--output-dir", str(tmp_path / "whole")]
    subprocess.run(folder, check=True, capture_output=True, timeout=300)
    with serving(root / "served") as server:
        server.drop_every = 10
        path = f"{server.url}/scans-{{0..3}}.tar" if form == "served" else form
        packed = [*command, "--data.path", path, "--output-dir", str(tmp_path / "run")]
        for kill in range(3):
            process = subprocess.Popen(packed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while len(list((tmp_path / "run/checkpoints").glob("step_*"))) < min(kill + 1, 2):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(packed, check=True, capture_output=True, timeout=300)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def refused(capsys, path, *more):
    """What training on `path` says, in one line on stderr."""
    assert beit(TRAIN, "--weights W.pth --steps 4 --output-dir refused --fresh", SHORT, "--data.path", path, *more) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    return errors[0]


def test_bad_input_is_one_line_that_names_it(root, tmp_path, capsys):
    gray = np.full((40, 40), 1000, np.uint16)
    for name, odd in (("channels", np.zeros((40, 40, 3), np.uint8)), ("depths", gray.astype(np.uint8))):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(12):
            Image.fromarray(gray if number != 7 else odd).save(folder / f"{number:02d}.png")
    assert "07.png has 3 x uint8" in refused(capsys, tmp_path / "channels")
    assert "07.png has 1 x uint8" in refused(capsys, tmp_path / "depths")
    assert "--data.channels is 2; give --data.channels 1" in refused(capsys, tmp_path / "depths", "--data.channels 2")
    (tmp_path / "parquet").mkdir()
    whole = (root / "parquet/train-0.parquet").read_bytes()
    (tmp_path / "parquet/train-0.parquet").write_bytes(whole[: len(whole) // 2])
    assert "train-0.parquet: cannot be read as parquet" in refused(capsys, tmp_path / "parquet")
    assert "http://127.0.0.1:9/a.tar" in refused(capsys, "http://127.0.0.1:9/a.tar")
    with serving(tmp_path) as server:
        shard = (root / "served/scans-0.tar").read_bytes()
        (tmp_path / "early.tar").write_bytes(shard[: len(shard) // 2])
        assert "early.tar: cut off at byte" in refused(capsys, f"{server.url}/early.tar")
        assert "early.tar: cut off at byte" in refused(capsys, tmp_path / "early.tar")


def test_a_dry_run_says_what_the_budget_buys(capsys):
    assert beit(TRAIN, "--weights W.pth --data.path D --steps 50 --output-dir planned --dry-run", SHORT) == 0
    printed = capsys.readouterr().out
    assert "400 images seen: 2.0 times each of 200" in printed
    assert "tried on built-in images" in printed
    assert not Path("planned").exists()


def test_weights_that_classify_are_refused_in_one_line(root, capsys):
    model = beit_fast.Beit(
        BeitConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=2).for_classification(7)
    )
    torch.save({"model": model.state_dict()}, "ft.pth")
    error = refused(capsys, "D", "--weights ft.pth")
    assert "were fine-tuned to classify (a head of 7 classes" in error
    assert "--fine-tuned-weights takes them all the same" in error


def test_a_size_that_is_not_square(run, capsys):
    assert beit(TRAIN, "--weights W.pth --data.path D --steps 1 --output-dir wide --model.image-size 24 40", SHORT) == 0
    assert BeitForMaskedImageModeling.from_pretrained("wide").config.image_hw == (24, 40)
