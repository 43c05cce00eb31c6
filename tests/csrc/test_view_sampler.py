"""Windows, flips, factors and the epoch order against independent numpy implementations, in distribution."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from beit_fast import _C

DRAWS = 10_000


def random_resized_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height, width: Inception's window, as torchvision documents it."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def windows(height: int, width: int, count: int = DRAWS, **options: object) -> NDArray[np.int32]:
    shape = np.full(count, height), np.full(count, width)
    drawn, _, _ = _C.sample_views(*shape, np.arange(count), 11, 2, **options)  # type: ignore[arg-type]
    return drawn


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (500, 334, (0.08, 1.0), (3 / 4, 4 / 3)),
        (300, 1500, (0.2, 1.0), (3 / 4, 4 / 3)),  # most attempts fail
        (64, 64, (0.35, 0.8), (1.0, 2.0)),
        (9, 7, (0.08, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_windows_are_distributed_as_random_resized_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    rng = np.random.default_rng(5)
    expected = np.array([random_resized_crop(rng, height, width, scale, ratio) for _ in range(DRAWS)])
    drawn = windows(height, width, scale=scale, ratio=ratio).astype(np.int64)

    def summaries(w: NDArray[np.int64]) -> dict[str, NDArray[np.floating]]:
        top, left, h, wide = w.T
        return {
            "area": h * wide,
            "ratio": wide / h,
            "top": top,
            "left": left,
            "vertical place": top / np.maximum(height - h, 1),
            "horizontal place": left / np.maximum(width - wide, 1),
        }

    theirs = summaries(expected)
    for name, ours in summaries(drawn).items():
        assert scipy.stats.ks_2samp(ours, theirs[name]).pvalue > 1e-3, name


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    low=st.floats(0.001, 1),
    high=st.floats(0.001, 1),
    narrow=st.floats(0.05, 5),
    wide=st.floats(0.05, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_windows_lie_in_the_image(
    height: int, width: int, low: float, high: float, narrow: float, wide: float, seed: int
) -> None:
    scale, ratio = sorted((low, high)), sorted((narrow, wide))
    drawn, _, _ = _C.sample_views([height] * 20, [width] * 20, np.arange(20), seed, 0, scale=scale, ratio=ratio)
    top, left, h, w = drawn.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_degenerate_images() -> None:
    assert (windows(1, 1, 50) == [0, 0, 1, 1]).all()
    # 3000 x 2: ten attempts almost never fit, and the fallback is the centre at the widest ratio allowed.
    tall, flat = windows(3000, 2, 500), windows(2, 3000, 500)
    assert np.unique(tall, axis=0).tolist() == [[1498, 0, 3, 2]]
    assert np.unique(flat, axis=0).tolist() == [[0, 1498, 2, 3]]
    huge, _, _ = _C.sample_views([2**31 - 1], [2**31 - 1], [0], 0, 0)
    assert (huge > 0).all()
    assert (huge[0, :2].astype(np.int64) + huge[0, 2:] < 2**31).all()


def test_whole_image_when_asked() -> None:
    assert (windows(40, 40, 30, scale=(1.0, 1.0), ratio=(1.0, 1.0)) == [0, 0, 40, 40]).all()


def test_flips_and_factors() -> None:
    count = 50_000
    ones = np.ones(count, dtype=np.int32)
    _, flips, factors = _C.sample_views(
        ones, ones, np.arange(count), 3, 4, flip_probability=0.3, brightness=0.4, contrast=0.8, saturation=1.5
    )
    assert flips.dtype == np.bool_
    assert factors.dtype == np.float32
    assert scipy.stats.binomtest(int(flips.sum()), count, 0.3).pvalue > 0.01
    for values, (low, high) in zip(factors.T, [(0.6, 1.4), (0.2, 1.8), (0.0, 2.5)], strict=True):
        assert scipy.stats.kstest(values, scipy.stats.uniform(low, high - low).cdf).pvalue > 0.01
    together = np.column_stack([flips, factors])
    assert np.abs(np.corrcoef(together.T) - np.eye(4)).max() < 4.5 / math.sqrt(count)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_no_flip_and_every_flip(probability: float, expected: float) -> None:
    _, flips, factors = _C.sample_views(
        [5] * 999, [5] * 999, range(999), 0, 0, (0.08, 1), (0.75, 1.33), probability, 0, 0, 0
    )
    assert flips.mean() == expected
    assert (factors == 1).all()


def test_views_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    heights, widths, indices = rng.integers(1, 900, 200), rng.integers(1, 900, 200), rng.integers(0, 2**62, 200)
    whole = _C.sample_views(heights, widths, indices, 2**63, 9)
    order = rng.permutation(200)
    for rows in (order[:1], order[1:17], order[17:]):
        part = _C.sample_views(heights[rows], widths[rows], indices[rows], 2**63, 9)
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, b[rows])


def test_masks_windows_and_colours_are_independent() -> None:
    count = 20_000
    masks = np.zeros((count, 14, 14), dtype=bool)
    _C.sample_masks(masks, np.arange(count), 1, 1, 75)
    drawn, flips, factors = _C.sample_views([400] * count, [400] * count, np.arange(count), 1, 1)
    columns = [masks[:, 3, 3], masks[:, 7, 7], masks[:, :7].sum((1, 2)), *drawn.T, flips, *factors.T]
    correlation = np.corrcoef(np.array(columns, dtype=np.float64))
    cross = correlation[:3, 3:], correlation[3:7, 7:], correlation[7:, 7:] - np.eye(4)
    assert max(np.abs(c).max() for c in cross) < 4.5 / math.sqrt(count)


def test_order_is_a_permutation() -> None:
    for length in [*range(1, 300), 1000, 4097]:
        order = _C.permute(np.arange(length), length, 1, 2)
        np.testing.assert_array_equal(np.sort(order), np.arange(length))


def test_order_of_an_imagenet() -> None:
    length = 1_281_167
    order = _C.permute(np.arange(length), length, 0, 3)
    assert (np.bincount(order, minlength=length) == 1).all()
    places = np.linspace(0, length, 51).astype(int)
    seen = np.array([np.histogram(order[a:b], 50, (0, length))[0] for a, b in itertools.pairwise(places)])
    assert scipy.stats.chisquare(seen.ravel()).pvalue > 0.01
    assert abs(scipy.stats.kendalltau(order[:5000], np.arange(5000)).pvalue) > 0.01
    assert (np.abs(np.diff(order)) < 10).mean() < 3 * 20 / length


def test_order_of_an_enormous_set() -> None:
    length = 10**15 + 7
    order = _C.permute(np.arange(20_000), length, 8, 8)
    assert len(np.unique(order)) == 20_000
    assert scipy.stats.kstest(order / length, "uniform").pvalue > 0.01


def test_every_order_of_four_is_alike() -> None:
    orders = [tuple(_C.permute(np.arange(4), 4, seed, epoch).tolist()) for seed in range(60) for epoch in range(100)]
    _, seen = np.unique(np.array(orders), axis=0, return_counts=True)
    assert len(seen) == 24
    assert scipy.stats.chisquare(seen).pvalue > 0.01


@pytest.mark.parametrize("length", [7, 100])
def test_each_sample_meets_each_place_alike(length: int) -> None:
    orders = np.array([_C.permute(np.arange(length), length, 4, epoch) for epoch in range(4000)])
    for position in (0, 1, length // 2, length - 1):
        assert scipy.stats.chisquare(np.bincount(orders[:, position], minlength=length)).pvalue > 1e-3
    pairs = np.bincount(orders[:, 0] * length + orders[:, 1], minlength=length**2).reshape(length, length)
    assert (pairs.diagonal() == 0).all()
    assert scipy.stats.chisquare(pairs[~np.eye(length, dtype=bool)]).pvalue > 1e-3


def test_positions_may_come_in_any_batch() -> None:
    whole = _C.permute(np.arange(1000), 1000, 5, 6)
    rows = np.random.default_rng(0).integers(0, 1000, 64)
    np.testing.assert_array_equal(_C.permute(rows, 1000, 5, 6), whole[rows])
    assert not np.array_equal(_C.permute(np.arange(1000), 1000, 5, 7), whole)
    assert not np.array_equal(_C.permute(np.arange(1000), 1000, 6, 6), whole)


VIEWS = {"heights": [9, 9], "widths": [9, 9], "indices": [0, 1], "seed": 0, "epoch": 0}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("heights", [9]),
        ("heights", [9, 0]),
        ("heights", [9, -1]),
        ("heights", [9, 2**31]),
        ("heights", [9.0, 9.0]),
        ("widths", [9, 9, 9]),
        ("widths", [0, 9]),
        ("widths", None),
        ("indices", [0, -1]),
        ("indices", [[0, 1]]),
        ("seed", -1),
        ("epoch", 2**32),
        ("scale", (0.0, 1.0)),
        ("scale", (-0.1, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.5)),
        ("scale", (NAN, 1.0)),
        ("scale", 0.5),
        ("scale", (0.1, 0.2, 0.3)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("ratio", (1.0, INF)),
        ("ratio", ("a", "b")),
        ("flip_probability", -0.1),
        ("flip_probability", 1.1),
        ("flip_probability", NAN),
        ("brightness", -0.1),
        ("contrast", INF),
        ("saturation", NAN),
        ("saturation", None),
    ],
)
def test_a_bad_argument_of_sample_views_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        _C.sample_views(**{**VIEWS, name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("length", 0),
        ("length", -5),
        ("length", 2.5),
        ("positions", [10]),
        ("positions", [-1]),
        ("positions", [0.5]),
        ("positions", 3),
        ("seed", -1),
        ("epoch", -1),
    ],
)
def test_a_bad_argument_of_permute_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        _C.permute(**{"positions": [0], "length": 10, "seed": 0, "epoch": 0, name: bad})  # type: ignore[arg-type]
