"""Likely mistakes in Python: each ends in one line that names the way out."""

import numpy as np
import pytest
import torch

import beit_fast


@pytest.fixture(scope="module")
def model():
    return beit_fast.create_model("beit_tiny_patch16_224", depth=1).eval()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 224, 224), np.float32), r"got ndarray: \(torch.as_tensor\(images\).float\(\) / 255"),
        (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), r"got torch.uint8"),
        (torch.zeros(1, 1, 224, 224), r"must be \(B, 3, height, width\), got \(1, 1, 224, 224\)"),
        (torch.zeros(3, 224, 224), r"must be \(B, 3, height, width\), got \(3, 224, 224\)"),
        (torch.zeros(1, 3, 225, 224), "multiples of the patch size 16, got 225x224"),
    ],
)
def test_images_that_are_none(model, images, message):
    with pytest.raises(ValueError, match=message) as error:
        model(images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: beit_fast.accelerate("beit"), r"accelerate\(timm.create_model\('beit'\)\)"),
        (lambda: beit_fast.accelerate(torch.nn.Linear(2, 2)), "nothing to accelerate in Linear"),
        (lambda: beit_fast.create_model("beit_bas_patch16_224"), "is unknown; choose one of"),
        (lambda: beit_fast.Beit.from_pretrained("/nope"), "/nope: no such folder"),
        (lambda: beit_fast.use_backend("cuda"), "cuda"),
    ],
)
def test_calls_that_cannot_work(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_run_that_has_not_finished_says_so(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="this run has not finished and left no model"):
        beit_fast.Beit.from_pretrained(tmp_path / "run")
