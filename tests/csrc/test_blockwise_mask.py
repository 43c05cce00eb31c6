"""The mask sampler against a plain Python port of the official algorithm, in distribution and draw by draw."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from beit_fast import _C
from benchmarks.baselines.libraries import PythonBlockwiseMasking

GRID = (14, 14)
CELLS = 196


def sample(
    count: int,
    mode: str,
    grid: tuple[int, int] = GRID,
    num_masked: int = 75,
    seed: int = 1,
    first: int = 0,
    **bounds: float | None,
) -> NDArray[np.bool_]:
    out = np.ones((count, *grid), dtype=bool)
    counts = _C.sample_masks(out, np.arange(first, first + count), seed, 0, num_masked, mode=mode, **bounds)  # type: ignore[arg-type]
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts, out.sum((1, 2)))
    return out


@pytest.fixture(scope="module")
def official() -> NDArray[np.bool_]:
    return sample(200_000, "official")


@pytest.fixture(scope="module")
def ported() -> NDArray[np.bool_]:
    draw = PythonBlockwiseMasking(GRID, 75)
    return np.stack([draw() for _ in range(15_000)]).astype(bool)


class PhiloxRandom:
    """The draws of sample `index` under the interface of Python's `random`: one Philox block per attempt."""

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        self.key = [seed & 0xFFFFFFFF, seed >> 32]
        self.counter = [1 << 28, epoch, index & 0xFFFFFFFF, index >> 32]
        self.words: list[int] = []
        self.second_uniform = False

    def uniform(self, low: float, high: float) -> float:
        if not self.second_uniform:
            self.words = list(_C.philox4x32_10(self.counter, self.key))
            self.counter[0] += 1
        self.second_uniform = not self.second_uniform
        return low + (high - low) * (self.words.pop(0) / 2**32)

    def randint(self, low: int, high: int) -> int:
        return low + (self.words.pop(0) * (high - low + 1) >> 32)


@pytest.mark.parametrize(
    ("grid", "num_masked", "min_num_patches", "max_num_patches", "min_aspect"),
    [
        ((14, 14), 75, 16, None, 0.3),
        ((14, 14), 75, 4, None, 0.3),
        ((9, 31), 120, 16, 40, 0.5),
        ((64, 5), 200, 10, None, 0.1),
        ((64, 64), 2000, 100, 1000, 0.3),
        ((3, 3), 8, 9, None, 0.9),
    ],
)
def test_official_mode_is_the_official_algorithm_draw_by_draw(
    grid: tuple[int, int], num_masked: int, min_num_patches: int, max_num_patches: int | None, min_aspect: float
) -> None:
    seed, epoch = 0xDEADBEEF12345678, 3
    indices = np.concatenate([np.arange(100), [2**40 + 1, 2**63 - 1]])
    out = np.zeros((len(indices), *grid), dtype=np.uint8)
    bounds = (min_num_patches, max_num_patches, min_aspect)
    _C.sample_masks(out, indices, seed, epoch, num_masked, *bounds, mode="official")
    for index, mask in zip(indices.tolist(), out, strict=True):
        rng = PhiloxRandom(seed, epoch, index)
        port = PythonBlockwiseMasking(grid, num_masked, *bounds, rng)
        np.testing.assert_array_equal(mask, port())


def test_official_statistics(official: NDArray[np.bool_]) -> None:
    counts, coverage = official.sum((1, 2)), official.mean(0)
    assert counts.max() == 75
    assert counts.mean() == pytest.approx(74.475, abs=0.05)
    assert (counts == 75).mean() == pytest.approx(0.666, abs=0.01)
    assert (counts == 74).mean() == pytest.approx(0.233, abs=0.01)
    for corner in (coverage[0, 0], coverage[0, -1], coverage[-1, 0], coverage[-1, -1]):
        assert corner == pytest.approx(0.041, abs=0.005)
    assert coverage[6:8, 6:8] == pytest.approx(np.full((2, 2), 0.716), abs=0.005)
    assert min(coverage[-1].min(), coverage[:, -1].min()) > 0.03


def test_official_counts_are_those_of_the_port(official: NDArray[np.bool_], ported: NDArray[np.bool_]) -> None:
    bins = [0, 71, 72, 73, 74, 75, 76]
    table = [np.histogram(masks.sum((1, 2)), bins)[0] for masks in (official, ported)]
    assert scipy.stats.chi2_contingency(table).pvalue > 0.01


def test_official_coverage_is_that_of_the_port(official: NDArray[np.bool_], ported: NDArray[np.bool_]) -> None:
    p = official.mean(0)
    z = (ported.mean(0) - p) / np.sqrt(p * (1 - p) * (1 / len(ported) + 1 / len(official)))
    assert np.abs(z).max() < 4
    assert np.sqrt((z**2).mean()) < 1.3


def perimeter(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1))).astype(np.int64)
    return np.abs(np.diff(padded, axis=1)).sum((1, 2)) + np.abs(np.diff(padded, axis=2)).sum((1, 2))


def test_official_shapes_are_those_of_the_port(official: NDArray[np.bool_], ported: NDArray[np.bool_]) -> None:
    assert scipy.stats.ks_2samp(perimeter(official[:50_000]), perimeter(ported)).pvalue > 0.01


@pytest.mark.parametrize("mode", ["official", "exact"])
def test_coverage_is_symmetric(mode: str) -> None:
    p = sample(200_000, mode, seed=2).mean(0)
    spread = np.sqrt(p * (1 - p) * 2 / 200_000)
    for other in (p[::-1], p[:, ::-1], p.T):
        assert (np.abs(other - p) <= 4.5 * spread).all()


def test_exact_is_official_grown_to_the_count(official: NDArray[np.bool_]) -> None:
    exact = sample(200_000, "exact")
    assert (exact.sum((1, 2)) == 75).all()
    assert (exact >= official).all()  # same draws: the blocks are there, and only cells beside them are added
    assert np.abs(exact.mean(0) - official.mean(0)).max() <= 0.005
    full = official.sum((1, 2)) == 75
    np.testing.assert_array_equal(exact[full], official[full])


def components(mask: NDArray[np.bool_]) -> int:
    return int(scipy.ndimage.label(mask)[1])


def test_growth_adds_no_island(official: NDArray[np.bool_]) -> None:
    exact = sample(3000, "exact")
    assert all(components(e) <= components(o) for e, o in zip(exact, official[:3000], strict=True))


def test_random_mode_takes_cells_evenly() -> None:
    masks = sample(100_000, "random")
    assert (masks.sum((1, 2)) == 75).all()
    expected = 75 / CELLS
    z = (masks.mean(0) - expected) / np.sqrt(expected * (1 - expected) / len(masks))
    assert np.abs(z).max() < 4.5
    both = (masks[:, 3, 3] & masks[:, 3, 4]).mean()  # pairs of neighbours, without replacement
    assert both == pytest.approx(expected * 74 / 195, abs=5e-3)


def test_random_mode_reaches_every_subset_alike() -> None:
    masks = sample(20_000, "random", grid=(2, 3), num_masked=3).reshape(-1, 6)
    seen = np.bincount(masks @ (1 << np.arange(6)), minlength=64)
    assert (seen > 0).sum() == 20
    assert scipy.stats.chisquare(seen[seen > 0]).pvalue > 0.01


def test_none_masks_nothing() -> None:
    assert not sample(5, "none").any()
    assert not sample(5, "none", num_masked=10**6).any()  # the count is not read


@settings(max_examples=150, deadline=None)
@given(
    h=st.integers(1, 64),
    w=st.integers(1, 64),
    share=st.floats(0, 1),
    block=st.floats(0, 1),
    min_aspect=st.floats(0.01, 1),
    mode=st.sampled_from(["exact", "official", "random"]),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**63 - 10),
)
def test_any_grid_and_any_count(
    h: int, w: int, share: float, block: float, min_aspect: float, mode: str, seed: int, epoch: int, first: int
) -> None:
    num_masked, least = round(share * h * w), max(1, round(block * h * w))
    indices = np.arange(first, first + 6)

    def draw(which: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = np.full((len(which), h, w), 7, dtype=np.uint8)
        counts = _C.sample_masks(out, which, seed, epoch, num_masked, least, None, min_aspect, mode=mode)
        np.testing.assert_array_equal(counts, out.sum((1, 2)))
        return out

    masks = draw(indices)
    assert set(np.unique(masks)) <= {0, 1}
    assert (masks.sum((1, 2)) <= num_masked).all() if mode == "official" else (masks.sum((1, 2)) == num_masked).all()
    np.testing.assert_array_equal(draw(indices[::-1])[::-1], masks)
    np.testing.assert_array_equal(np.concatenate([draw(indices[:1]), draw(indices[1:3]), draw(indices[3:])]), masks)


@pytest.mark.parametrize("mode", ["exact", "random"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 64), (64, 1), (2, 2), (14, 14), (64, 64)])
def test_all_and_none_of_the_patches(grid: tuple[int, int], mode: str) -> None:
    cells = grid[0] * grid[1]
    assert sample(4, mode, grid=grid, num_masked=cells, min_num_patches=1).all()
    assert not sample(4, mode, grid=grid, num_masked=0, min_num_patches=1).any()


def test_where_no_block_fits() -> None:
    # A block may not span the grid, so one row holds none; `exact` grows from one cell, which may be any.
    assert not sample(50, "official", grid=(1, 20), num_masked=8).any()
    exact = sample(20_000, "exact", grid=(1, 20), num_masked=8)
    assert all(components(mask) == 1 and mask.sum() == 8 for mask in exact[:200])
    one = sample(20_000, "exact", grid=(1, 20), num_masked=1)
    assert scipy.stats.chisquare(one.sum((0, 1))).pvalue > 0.01


def test_seed_epoch_and_index_each_change_the_mask() -> None:
    def one(seed: int, epoch: int, index: int) -> bytes:
        out = np.zeros((1, *GRID), dtype=bool)
        _C.sample_masks(out, [index], seed, epoch, 75)
        return out.tobytes()

    keys = [(s, e, i) for s in (0, 1, 2**32, 2**63) for e in (0, 1, 2**32 - 1) for i in (0, 1, 2**32, 2**62)]
    assert len({one(*key) for key in keys}) == len(keys)
    assert one(*keys[0]) == one(*keys[0])


def test_threads_of_python_get_the_same_masks() -> None:
    whole = sample(4096, "exact")
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda first: sample(256, "exact", first=first), range(0, 4096, 256)))
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_neighbouring_samples_are_independent(official: NDArray[np.bool_]) -> None:
    p = official.mean(0, dtype=np.float64)
    centred = (official[:20_000] - p) / np.sqrt(p * (1 - p))
    for lag in (1, 2, 14):
        correlation = (centred[:-lag] * centred[lag:]).mean(0)
        assert np.abs(correlation).max() < 4.5 / np.sqrt(20_000)


GOOD = {"out": np.zeros((2, 14, 14), dtype=bool), "indices": [0, 1], "seed": 0, "epoch": 0, "num_masked": 75}
READ_ONLY = np.zeros((2, 14, 14), dtype=bool)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("out", np.zeros((2, 14, 14), dtype=np.float32)),
        ("out", np.zeros((2, 14, 14), dtype=np.int8)),
        ("out", np.zeros((2, 196), dtype=bool)),
        ("out", np.zeros((2, 14, 28), dtype=bool)[:, :, ::2]),
        ("out", READ_ONLY),
        ("out", [[[False]]]),
        ("out", None),
        ("out", np.zeros((2, 0, 14), dtype=bool)),
        ("out", np.zeros((2, 14, 65), dtype=bool)),
        ("indices", [0]),
        ("indices", [0, 1, 2]),
        ("indices", [0, -1]),
        ("indices", [[0, 1]]),
        ("indices", [0.0, 1.0]),
        ("indices", ["a", "b"]),
        ("indices", np.array([0, 2**63], dtype=np.uint64)),
        ("indices", None),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("seed", None),
        ("epoch", -1),
        ("epoch", 2**32),
        ("epoch", "1"),
        ("num_masked", -1),
        ("num_masked", 197),
        ("num_masked", 7.5),
        ("num_masked", 2**80),
        ("min_num_patches", 0),
        ("min_num_patches", -16),
        ("min_num_patches", 197),
        ("max_num_patches", 15),
        ("max_num_patches", -1),
        ("max_num_patches", "all"),
        ("min_aspect", 0.0),
        ("min_aspect", -0.3),
        ("min_aspect", float("nan")),
        ("min_aspect", float("inf")),
        ("min_aspect", None),
        ("max_aspect", 0.2),
        ("max_aspect", float("nan")),
        ("max_aspect", float("inf")),
        ("mode", "blockwise"),
        ("mode", None),
    ],
)
def test_a_bad_argument_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        _C.sample_masks(**{**GOOD, name: bad})  # type: ignore[arg-type]


def test_an_inverse_aspect_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect"):
        _C.sample_masks(**GOOD, min_aspect=1.5)  # type: ignore[arg-type]


def test_empty_batch() -> None:
    assert _C.sample_masks(np.zeros((0, 14, 14), dtype=bool), [], 0, 0, 75).shape == (0,)
