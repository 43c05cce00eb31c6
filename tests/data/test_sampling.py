"""The Python face of the samplers: shapes, dtypes, defaults, and what is said when the compiled module is missing."""

import sys

import numpy as np
import pytest
import torch

import beit_fast
from beit_fast import _C
from beit_fast.data.sampling import BlockwiseMasking, CropSampler, epoch_order, sample_keys


def test_masks() -> None:
    masking = BlockwiseMasking((14, 14), 75)
    masks = masking.sample(3, 1, torch.arange(10))
    assert masks.dtype == torch.bool
    assert masks.shape == (10, 14, 14)
    assert masks.sum((1, 2)).tolist() == [75] * 10
    expected = np.zeros((10, 14, 14), dtype=bool)
    _C.sample_masks(expected, np.arange(10), 3, 1, 75)
    np.testing.assert_array_equal(masks.numpy(), expected)
    assert torch.equal(masking.sample(3, 1, [4, 2]), masks[[4, 2]])
    assert masking.sample(3, 1, []).shape == (0, 14, 14)


def test_mask_options_reach_the_sampler() -> None:
    official = BlockwiseMasking((14, 14), 75, mode="official").sample(0, 0, range(500)).sum((1, 2))
    assert official.max() == 75
    assert official.min() < 75
    assert not BlockwiseMasking((14, 14), 75, mode="none").sample(0, 0, range(5)).any()
    small = BlockwiseMasking((14, 14), 4, min_num_patches=4, min_aspect=0.9, mode="official").sample(0, 0, range(50))
    for mask in small:  # one 2 x 2 block
        rows, columns = mask.nonzero(as_tuple=True)
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (1, 1)
    limited = BlockwiseMasking((30, 20), 90, min_num_patches=4, max_num_patches=4, min_aspect=1.0, mode="official")
    assert limited.sample(0, 0, range(20)).shape == (20, 30, 20)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_masked", {"grid": (14, 14), "num_masked": 197}),
        ("num_masked", {"grid": (14, 14), "num_masked": -1}),
        ("grid", {"grid": (0, 14), "num_masked": 1}),
        ("grid", {"grid": (-1, 14), "num_masked": 1}),
        ("grid", {"grid": (14, 65), "num_masked": 1}),
        ("grid", {"grid": (14, 14, 14), "num_masked": 1}),
        ("min_num_patches", {"grid": (14, 14), "num_masked": 75, "min_num_patches": -4}),
        ("max_num_patches", {"grid": (14, 14), "num_masked": 75, "max_num_patches": 4}),
        ("min_aspect", {"grid": (14, 14), "num_masked": 75, "min_aspect": float("nan")}),
        ("min_aspect", {"grid": (14, 14), "num_masked": 75, "min_aspect": float("inf")}),
        ("mode", {"grid": (14, 14), "num_masked": 75, "mode": "blocks"}),
    ],
)
def test_bad_masking_is_refused_when_it_is_described(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        BlockwiseMasking(**arguments)


def test_views() -> None:
    sampling = CropSampler()
    views = sampling.sample(3, 1, torch.arange(6), [375] * 6, torch.full((6,), 500))
    assert (views.windows.shape, views.windows.dtype) == ((6, 4), np.int32)
    assert (views.flips.shape, views.flips.dtype) == ((6,), np.bool_)
    assert (views.factors.shape, views.factors.dtype) == ((6, 3), np.float32)
    for ours, theirs in zip(views, _C.sample_views([375] * 6, [500] * 6, range(6), 3, 1), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # the defaults of the two are the same
    still = CropSampler((1, 1), (1, 1), 1.0, 0, 0, 0).sample(0, 0, [0], [9], [9])
    assert still.windows.tolist() == [[0, 0, 9, 9]]
    assert still.flips.tolist() == [True]
    assert still.factors.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("scale", {"scale": (0.5, 0.1)}),
        ("ratio", {"ratio": (0, 1)}),
        ("flip_probability", {"flip_probability": 2}),
        ("brightness", {"brightness": -1}),
        ("contrast", {"contrast": float("inf")}),
        ("saturation", {"saturation": float("nan")}),
    ],
)
def test_bad_views_are_refused_when_they_are_described(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        CropSampler(**arguments)


def test_order_and_keys() -> None:
    assert sorted(epoch_order(range(50), 50, 1, 2).tolist()) == list(range(50))
    keys = sample_keys(1, 2, torch.arange(50))
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == 50


def test_without_the_compiled_module_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(beit_fast, "_C")
    monkeypatch.setitem(sys.modules, "beit_fast._C", None)  # as if it had not been built
    with pytest.raises(ModuleNotFoundError) as raised:
        BlockwiseMasking((14, 14), 75)
    said = str(raised.value)
    assert "\n" not in said
    assert "pip install" in said
    assert "beit_fast._C" in said
