"""Resizing of position parameters against published values and an independent spline."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

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


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 20)), ((14, 10), (9, 32)), ((6, 8), (7, 3))])
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


def test_tables_too_small_for_a_spline_keep_their_offsets():
    table = torch.arange(9.0 + 3).unsqueeze(1)
    grown = resize_relative_position_bias_table(table, (2, 2), (3, 3))[:-3].view(5, 5)
    assert torch.equal(grown[1:4, 1:4], torch.arange(9.0).view(3, 3))


def test_resize_is_differentiable():
    table = torch.randn(7 * 7 + 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: resize_relative_position_bias_table(t, (4, 4), (5, 3)), table)


def test_wrong_window_is_named():
    with pytest.raises(ValueError, match="needs 732"):
        resize_relative_position_bias_table(torch.zeros(10, 1), (14, 14), (7, 7))


def test_absolute_embedding_keeps_cls_and_constants():
    embedding = torch.cat((torch.full((1, 1, 4), 5.0), torch.full((1, 16, 4), 2.0)), 1)
    resized = resize_position_embedding(embedding, (4, 4), (6, 3))
    assert resized.shape == (1, 19, 4)
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 18, 4), 2.0))
    assert torch.equal(resized[:, :1], embedding[:, :1])
    assert resize_position_embedding(embedding, (4, 4), (4, 4)) is embedding
