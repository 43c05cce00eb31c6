"""Resizing of position parameters against published values and an independent spline."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from torch._subclasses import FakeTensorMode

from beit_fast import use_backend
from beit_fast.models import resize
from beit_fast.models.resize import (
    _geometric_ratio,
    resize_position_embedding,
    resize_relative_position_bias_table,
    spline_matrix,
)


@pytest.mark.parametrize(
    ("source", "target", "ratio"),
    [(27, 47, 1.090307), (27, 63, 1.134918), (27, 79, 1.168504), (27, 59, 1.125056), (47, 63, 1.026143)],
)
def test_growth_of_the_source_grid(source, target, ratio):
    assert _geometric_ratio(source, target) == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("source", [5, 9, 27, 63])
@pytest.mark.parametrize("target", [3, 7, 31, 59, 301])
def test_the_growth_makes_the_distances_add_up(source, target):
    """Half the source's offsets reach half the target's; the growth is never below 1.01 or above 1.5."""
    if source == target:
        return

    def missing(ratio):
        return sum(ratio**i for i in range(source // 2)) - target // 2

    within = missing(1.01) < 0 < missing(1.5)
    expected = brentq(missing, 1.01, 1.5) if within else (1.01 if missing(1.01) > 0 else 1.5)
    assert _geometric_ratio(source, target) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("side", "values"),
    [
        (47, [1.000000, -0.856889, 0.145345, 0.264269, 0.110526, 8.227060, 4367.1262]),
        (63, [1.000011, -0.856873, 0.145345, 0.261057, 0.108579, 8.227034, 8346.0065]),
        (79, [1.000003, -0.856884, 0.145345, 0.258885, 0.107285, 8.227052, 13657.3405]),
        (13, [1.492476, 0.912427, 0.145345, 0.271241, 0.114927, 2.160986, 119.5677]),
    ],
)
def test_published_values(side, values):
    i, j = torch.meshgrid(torch.arange(27), torch.arange(27), indexing="ij")
    sheet = (torch.sin(0.3 * i) + torch.cos(0.2 * j) + 0.01 * i * j).float()
    table = torch.cat((sheet.reshape(-1, 1), torch.tensor([[7.0], [8.0], [9.0]])))
    w = (side + 1) // 2
    resized = resize_relative_position_bias_table(table, (14, 14), (w, w))
    a, c = resized[:-3].view(side, side), side // 2
    got = [a[0, 0], a[0, c], a[c, c], a[c, c + 2], a[c + 2, c], a[-1, -1]]
    np.testing.assert_allclose([float(v) for v in got], values[:-1], atol=1e-5)
    assert a.double().sum().item() == pytest.approx(values[-1], abs=2e-3)
    assert torch.equal(resized[-3:], table[-3:])


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 20)), ((14, 10), (9, 32)), ((6, 8), (7, 3)), ((3, 4), (40, 2))]
)
def test_non_square_windows_against_scipy(old, new):
    rng = np.random.default_rng(0)
    sheet = rng.normal(size=(2 * old[0] - 1, 2 * old[1] - 1, 2))

    def along(values, source, target):
        s, d = 2 * source - 1, 2 * target - 1
        if s == d:
            return values
        q = _geometric_ratio(s, d)
        u = np.cumsum(q ** np.arange(s // 2))
        x = np.concatenate((-u[::-1], [0], u))
        at = np.clip(np.arange(-(d // 2), d // 2 + 1), x[0], x[-1])
        return CubicSpline(x, values, bc_type="not-a-knot")(at)

    expected = along(sheet, old[0], new[0])
    expected = along(expected.transpose(1, 0, 2), old[1], new[1]).transpose(1, 0, 2)
    table = torch.cat((torch.from_numpy(sheet).flatten(0, 1), torch.zeros(3, 2, dtype=torch.float64)))
    resized = resize_relative_position_bias_table(table, old, new)[:-3]
    np.testing.assert_allclose(resized.numpy(), expected.reshape(-1, 2), atol=1e-11)


def test_nearest_offsets_are_copied():
    matrix = spline_matrix(14, 24)
    for offset in (-1, 0, 1):
        expected = torch.zeros(27, dtype=torch.float64)
        expected[13 + offset] = 1
        torch.testing.assert_close(matrix[23 + offset], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("old", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("new", [(1, 3), (2, 5), (3, 1), (4, 4)])
def test_tables_too_small_for_a_spline_keep_their_offsets(old, new):
    """Each offset has the value of the nearest that was learned."""
    rows = (2 * old[0] - 1) * (2 * old[1] - 1)
    sheet = torch.arange(float(rows)).view(2 * old[0] - 1, 2 * old[1] - 1)
    table = torch.cat((sheet.view(-1, 1), torch.tensor([[-1.0], [-2.0], [-3.0]])))
    resized = resize_relative_position_bias_table(table, old, new)
    for (down, across), value in np.ndenumerate(resized[:-3].view(2 * new[0] - 1, 2 * new[1] - 1).numpy()):
        y = min(max(down - new[0] + 1, 1 - old[0]), old[0] - 1)
        x = min(max(across - new[1] + 1, 1 - old[1]), old[1] - 1)
        assert value == sheet[y + old[0] - 1, x + old[1] - 1]
    assert resized[-3:].flatten().tolist() == [-1, -2, -3]


def test_resize_is_differentiable():
    table = torch.randn(7 * 7 + 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: resize_relative_position_bias_table(t, (4, 4), (5, 3)), table)


@pytest.mark.parametrize("rows", [10, 623, 625])
def test_wrong_window_is_named(rows):
    with pytest.raises(ValueError) as error:
        resize_relative_position_bias_table(torch.zeros(rows, 2), (14, 12), (7, 7))
    assert str(error.value) == f"relative position table has {rows} rows; window 14x12 needs 624"


def bicubic(old, new):
    """(new, old) weights of Keys' cubic convolution with a = -0.75 at the pixel centres, the border repeated."""
    weights = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x, a = abs(centre - tap), -0.75
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(tap, 0), old - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize(("old", "new"), [((4, 5), (6, 3)), ((3, 2), (3, 7)), ((14, 14), (24, 9))])
def test_absolute_embedding_is_interpolated_by_cubic_convolution(old, new):
    embedding = torch.randn(1, old[0] * old[1] + 1, 3, generator=torch.Generator().manual_seed(0))
    sheet = embedding[0, 1:].view(*old, 3).double().numpy()
    expected = np.einsum("ya,abd,xb->yxd", bicubic(old[0], new[0]), sheet, bicubic(old[1], new[1]))
    resized = resize_position_embedding(embedding, old, new)
    np.testing.assert_allclose(resized[0, 1:].numpy(), expected.reshape(-1, 3), atol=1e-5)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    assert resized.shape == (1, new[0] * new[1] + 1, 3)


def test_absolute_embedding_keeps_cls_and_constants():
    embedding = torch.cat((torch.full((1, 1, 4), 5.0), torch.full((1, 16, 4), 2.0)), 1)
    resized = resize_position_embedding(embedding, (4, 4), (6, 3))
    assert resized.shape == (1, 19, 4)
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 18, 4), 2.0))
    assert torch.equal(resized[:, :1], embedding[:, :1])
    assert resize_position_embedding(embedding, (4, 4), (4, 4)) is embedding


# Where the constant of two sizes lives.


def enlarged(table):
    return resize_relative_position_bias_table(table, (4, 3), (6, 5))


@pytest.fixture
def made(monkeypatch):
    """The sizes of every spline that is looked up."""
    sizes, original = [], resize._spline
    monkeypatch.setattr(resize, "_spline", lambda source, target: sizes.append(target) or original(source, target))
    resize._on_device.cache_clear()
    return sizes


def test_the_constant_is_kept_for_plain_tensors_alone(made):
    table = torch.randn(7 * 5 + 3, 2)
    first = enlarged(table)
    assert (made, enlarged(table).tolist()) == ([6, 5], first.tolist())
    assert made == [6, 5]
    with use_backend("reference"):
        assert torch.equal(enlarged(table), first)
    assert made == [6, 5, 6, 5]


def test_compiled_and_exported_graphs_hold_it_in_their_own_way(made):
    table, graphs = torch.randn(7 * 5 + 3, 2), []
    compiled = torch.compile(enlarged, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    assert torch.equal(compiled(table), enlarged(table))
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("beit_fast.spline_matrix" in call for call in calls) == 2

    class Enlarged(torch.nn.Module):
        def forward(self, table):
            return enlarged(table)

    exported = torch.export.export(Enlarged(), (table,))
    assert not [node for node in exported.graph.nodes if "spline_matrix" in str(node.target)]
    torch.testing.assert_close(exported.module()(table), enlarged(table))


@pytest.mark.parametrize(("source", "target"), [(2, 5), (6, 3)])
def test_the_op_without_data_has_the_shape_of_the_matrix(source, target):
    with FakeTensorMode():
        found = torch.ops.beit_fast.spline_matrix(torch.empty(9, 2), source, target)
    assert (found.shape, found.dtype) == ((2 * target - 1, 2 * source - 1), torch.float64)
