"""Fine-tuning and segmentation on two processes: what one process trains, measures and counts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from beit_fast.data.scenes import SURFACES
from beit_fast.train import engine
from tests.train.distributed import two_tasks
from tests.train.distributed.test_distributed import free_port


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment):
    """The folder of the runs, and what the two processes said."""
    folder = tmp_path_factory.mktemp("runs")
    for task in two_tasks.tasks(folder, "one"):
        assert engine.run(task).exit_code == 0
    command = [sys.executable, "-m", two_tasks.__name__, str(folder), str(free_port()), str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stderr


@pytest.mark.parametrize(
    ("task", "images", "score"), [("finetune", 23, "top1_percent"), ("segment", 5, "pixel_accuracy_percent")]
)
def test_two_processes_train_what_one_does(runs, task, images, score):
    """Weights, running statistics of batch norms over both processes, every validation image counted once."""
    folders = [runs[0] / name / task / "model" for name in ("one", "two")]
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")
    measured = [json.loads((folder / "preprocessing.json").read_text())["measured"] for folder in folders]
    assert measured[0]["validation_images"] == measured[1]["validation_images"] == images
    assert measured[0][score] == pytest.approx(measured[1][score], abs=100 / images + 1e-6)


def test_the_first_epoch_counts_the_label_maps_of_both_processes(runs):
    folder, said = runs
    paths = sorted((folder / "cache").rglob("*.png"))
    pixels = np.concatenate(
        [np.asarray(Image.open(path)).ravel() for path in paths if len(list(path.parent.glob("*.png"))) == 16]
    )
    absent = len(SURFACES) - len(np.unique(pixels))
    assert said.count("first epoch: ") == 1
    assert "first epoch: 16 label maps: 0.0 % of the pixels ignored" in said
    assert (f"{absent} of {len(SURFACES)} classes without a pixel" in said) == (absent > 0)


def test_batch_norms_of_one_process_are_another_result(runs):
    """What the test above would see if each process kept to its own images: the statistics did move."""
    values = load_file(runs[0] / "two/segment/model/model.safetensors")
    means = [value for name, value in values.items() if name.endswith("running_mean")]
    assert means
    assert all(mean.abs().max() > 1e-3 for mean in means)
