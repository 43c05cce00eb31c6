"""The CPU view transform against the plain formula in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from beit_fast import _C

WEIGHTS = np.array([0.299, 0.587, 0.114])  # ITU-R 601
HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Eight roundings of values up to 255 in float32, then the division by 255 * std.
LEVELS = 8 * 255 * 2.0**-24


def formula(
    crops: NDArray[np.uint8],
    flips: NDArray[np.bool_],
    factors: NDArray[np.float32],
    centers: NDArray[np.float32] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> NDArray[np.float64]:
    views = []
    for i, crop in enumerate(crops.astype(np.float64)):
        brightness, contrast, saturation = factors[i].astype(np.float64)
        center = (crop @ WEIGHTS).mean() if centers is None else float(centers[i])
        x = np.clip(crop * brightness, 0, 255)
        x = np.clip(contrast * x + (1 - contrast) * np.clip(brightness * center, 0, 255), 0, 255)
        x = np.clip(saturation * x + (1 - saturation) * (x @ WEIGHTS)[..., None], 0, 255)
        x = x[:, ::-1] if flips[i] else x
        views.append(((x / 255 - mean) / std).transpose(2, 0, 1))
    return np.stack(views)


def example(shape: tuple[int, int, int], seed: int = 0, strength: float = 0.4) -> tuple[NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    crops = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    crops[0] //= 8  # a dark image
    crops[-1] |= 0xC0  # and a bright one, where clipping bites
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, (shape[0], 3)).astype(np.float32)
    return crops, rng.random(shape[0]) < 0.5, factors


@pytest.mark.parametrize("normalisation", [(HALF, HALF), IMAGENET])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(6, 224, 224), (4, 112, 112), (3, 37, 53), (2, 1, 1), (3, 2, 3000), (2, 3000, 2)])
def test_transform_is_the_formula(shape: tuple[int, int, int], centered: bool, normalisation: tuple) -> None:
    crops, flips, factors = example(shape)
    flips[0], flips[-1] = True, False
    centers = np.linspace(0, 255, shape[0], dtype=np.float32) if centered else None
    ours = _C.transform_views(crops, flips, factors, centers, *normalisation)
    assert ours.dtype == np.float32
    expected = formula(crops, flips, factors, centers, *normalisation)
    levels = np.abs(ours - expected) * 255 * np.array(normalisation[1])[:, None, None]
    assert levels.max() <= LEVELS


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    h=st.integers(1, 40),
    w=st.integers(1, 200),
    strength=st.floats(0, 3),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 6),
)
def test_any_shape_and_any_strength(batch: int, h: int, w: int, strength: float, seed: int, threads: int) -> None:
    crops, flips, factors = example((batch, h, w), seed, strength)
    ours = _C.transform_views(crops, flips, factors, None, HALF, HALF, threads=threads)
    expected = formula(crops, flips, factors, None, HALF, HALF)
    assert np.abs(ours - expected).max() * 127.5 <= LEVELS * (1 + factors.max() ** 2)


def test_neutral_factors_only_normalise() -> None:
    crops = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    ones = np.ones((1, 3), dtype=np.float32)
    out = _C.transform_views(crops, np.array([False]), ones, None, (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(out[0] * 255, crops[0].transpose(2, 0, 1), atol=2e-5)
    assert out.min() == 0
    assert out.max() == pytest.approx(1, abs=1e-7)


def test_flip_is_a_mirror_bit_for_bit() -> None:
    crops, _, factors = example((5, 30, 71))
    flipped = _C.transform_views(crops, np.ones(5, dtype=bool), factors, None, *IMAGENET)
    plain = _C.transform_views(crops, np.zeros(5, dtype=bool), factors, None, *IMAGENET)
    np.testing.assert_array_equal(flipped, plain[..., ::-1])
    mirrored = _C.transform_views(np.ascontiguousarray(crops[:, :, ::-1]), np.zeros(5, bool), factors, None, *IMAGENET)
    np.testing.assert_array_equal(flipped, mirrored)


def test_threads_and_batches_do_not_matter() -> None:
    crops, flips, factors = example((13, 24, 40))
    whole = _C.transform_views(crops, flips, factors, None, *IMAGENET)
    for threads in (2, 3, 13, 64):
        np.testing.assert_array_equal(
            _C.transform_views(crops, flips, factors, None, *IMAGENET, threads=threads), whole
        )
    for rows in (slice(0, 1), slice(1, 6), slice(6, 13)):
        part = _C.transform_views(crops[rows], flips[rows], factors[rows], None, *IMAGENET)
        np.testing.assert_array_equal(part, whole[rows])


def test_given_centers_are_those_of_gray_means() -> None:
    crops, flips, factors = example((4, 64, 48))
    centers = _C.gray_means(crops)
    np.testing.assert_array_equal(
        _C.transform_views(crops, flips, factors, centers, HALF, HALF),
        _C.transform_views(crops, flips, factors, None, HALF, HALF),
    )


def test_output_is_written_in_place() -> None:
    crops, flips, factors = example((3, 8, 8))
    out = np.full((3, 3, 8, 8), np.nan, dtype=np.float32)
    returned = _C.transform_views(crops, flips.astype(np.uint8), factors, None, HALF, HALF, out)
    assert returned is out
    np.testing.assert_array_equal(out, _C.transform_views(crops, flips, factors, None, HALF, HALF))


@pytest.mark.parametrize("shape", [(4, 224, 224), (2, 1, 1), (3, 5, 3), (2, 16, 1), (1, 300, 600)])
def test_gray_means(shape: tuple[int, int, int]) -> None:
    crops, _, _ = example(shape)
    expected = (crops.astype(np.float64) @ WEIGHTS).mean((1, 2))
    np.testing.assert_allclose(_C.gray_means(crops), expected, rtol=1e-6)


def test_gray_mean_of_white_does_not_overflow() -> None:
    white = np.full((1, 1000, 1000, 3), 255, dtype=np.uint8)
    assert _C.gray_means(white)[0] == pytest.approx(255, rel=1e-6)


def test_empty_batch() -> None:
    crops = np.zeros((0, 8, 8, 3), dtype=np.uint8)
    out = _C.transform_views(crops, np.zeros(0, bool), np.zeros((0, 3), np.float32), None, HALF, HALF, threads=2)
    assert out.shape == (0, 3, 8, 8)
    assert _C.gray_means(crops).shape == (0,)


GOOD = {
    "crops": np.zeros((2, 4, 5, 3), dtype=np.uint8),
    "flips": np.zeros(2, dtype=bool),
    "factors": np.ones((2, 3), dtype=np.float32),
    "centers": None,
    "mean": HALF,
    "std": HALF,
}


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("crops", np.zeros((2, 4, 5, 3), dtype=np.float32)),
        ("crops", np.zeros((2, 3, 4, 5), dtype=np.uint8)),
        ("crops", np.zeros((4, 5, 3), dtype=np.uint8)),
        ("crops", np.zeros((2, 0, 5, 3), dtype=np.uint8)),
        ("crops", np.zeros((2, 4, 10, 3), dtype=np.uint8)[:, :, ::2]),
        ("crops", None),
        ("flips", np.zeros(3, dtype=bool)),
        ("flips", np.zeros(2, dtype=np.float32)),
        ("flips", [False, False]),
        ("factors", np.ones((2, 2), dtype=np.float32)),
        ("factors", np.ones((2, 3))),
        ("factors", np.full((2, 3), np.nan, dtype=np.float32)),
        ("factors", np.full((2, 3), -1, dtype=np.float32)),
        ("centers", np.ones(3, dtype=np.float32)),
        ("centers", np.ones(2)),
        ("centers", np.full(2, np.inf, dtype=np.float32)),
        ("mean", (0.5, 0.5)),
        ("mean", 0.5),
        ("mean", (0.5, 0.5, float("nan"))),
        ("std", (0.5, 0.5, 0.0)),
        ("std", (0.5, 0.5, -0.5)),
        ("std", ("a", "b", "c")),
        ("out", np.zeros((2, 3, 5, 4), dtype=np.float32)),
        ("out", np.zeros((2, 3, 4, 5))),
        ("out", np.zeros((2, 3, 4, 10), dtype=np.float32)[..., ::2]),
        ("out", np.broadcast_to(np.float32(0), (2, 3, 4, 5))),
        ("threads", 0),
        ("threads", -1),
        ("threads", 1.5),
        ("threads", 10**6),
    ],
)
def test_a_bad_argument_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        _C.transform_views(**{**GOOD, name: bad})  # type: ignore[arg-type]


def test_gray_means_names_its_argument() -> None:
    with pytest.raises(ValueError, match=r"^crops\b"):
        _C.gray_means(np.zeros((4, 5, 3), dtype=np.uint8))
