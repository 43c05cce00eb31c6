"""Position parameters for another input size than the one they were learned at."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def _geometric_ratio(source: int, target: int) -> float:
    """The growth rate q of the source grid's spacing, by bisection as in the official fine-tuning code."""
    left, right = 1.01, 1.5
    ratio = left
    while right - left > 1e-6:
        ratio = (left + right) / 2.0
        reached = (1.0 - ratio ** (source // 2)) / (1.0 - ratio)
        if reached > target // 2:
            right = ratio
        else:
            left = ratio
    return ratio


def _second_derivatives(x: Tensor) -> Tensor:
    """(s, s) map from values at the knots x to second derivatives of the not-a-knot cubic spline through them."""
    count = x.shape[0]
    h = x.diff()
    system = torch.zeros(count, count, dtype=torch.float64)
    rhs = torch.zeros(count, count, dtype=torch.float64)
    for i in range(1, count - 1):
        system[i, i - 1], system[i, i], system[i, i + 1] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        rhs[i, i - 1], rhs[i, i], rhs[i, i + 1] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    # Not-a-knot: the third derivative is continuous at the second and at the last but one knot.
    system[0, 0], system[0, 1], system[0, 2] = h[1], -(h[0] + h[1]), h[0]
    system[-1, -3], system[-1, -2], system[-1, -1] = h[-1], -(h[-2] + h[-1]), h[-2]
    return torch.linalg.solve(system, rhs)


@functools.lru_cache(maxsize=64)
def spline_matrix(source: int, target: int) -> Tensor:
    """The constant (2*target-1, 2*source-1) float64 matrix that resizes one axis of a relative position table.

    Knots lie at geometrically growing distances from offset 0, so that the nearest offsets are copied exactly; values
    outside the source range clamp to its border. Applied to both axes it equals the official code's bicubic
    interpolating spline (SciPy's former `interp2d(kind="cubic")`).

    Args:
        source, target: patches along the axis, at least 1.
    """
    s, d = 2 * source - 1, 2 * target - 1
    if s == d:
        return torch.eye(s, dtype=torch.float64)
    if s < 5:  # fewer knots than a not-a-knot spline has conditions for: nothing was learned to interpolate
        middle = torch.zeros(d, s, dtype=torch.float64)
        middle[torch.arange(d), (torch.arange(d) - d // 2).clamp(-(s // 2), s // 2) + s // 2] = 1.0
        return middle
    ratio = _geometric_ratio(s, d)
    distances = torch.tensor([ratio**k for k in range(s // 2)], dtype=torch.float64).cumsum(0)
    x = torch.cat((-distances.flip(0), torch.zeros(1, dtype=torch.float64), distances))
    at = torch.arange(-(d // 2), d // 2 + 1, dtype=torch.float64).clamp(x[0], x[-1])
    cell = (torch.searchsorted(x, at, right=True) - 1).clamp(0, s - 2)
    h = x.diff()[cell]
    right = (at - x[cell]) / h
    left = 1.0 - right
    rows = torch.arange(d)
    linear = torch.zeros(d, s, dtype=torch.float64)
    linear[rows, cell] += left
    linear[rows, cell + 1] += right
    curvature = torch.zeros(d, s, dtype=torch.float64)
    curvature[rows, cell] += (left**3 - left) * h**2 / 6
    curvature[rows, cell + 1] += (right**3 - right) * h**2 / 6
    return linear + curvature @ _second_derivatives(x)


def resize_relative_position_bias_table(
    table: Tensor, old_window: tuple[int, int], new_window: tuple[int, int]
) -> Tensor:
    """A relative position table learned at one patch grid, for another; differentiable.

    Args:
        table: ((2h-1)(2w-1) + 3, H) for `old_window` = (h, w); its last three rows (CLS) are kept.

    Returns:
        ((2h'-1)(2w'-1) + 3, H) in the table's dtype.

    Raises:
        ValueError: the table's rows do not fit `old_window`.
    """
    if old_window == new_window:
        return table
    height, width = 2 * old_window[0] - 1, 2 * old_window[1] - 1
    if table.shape[0] != height * width + 3:
        raise ValueError(
            f"relative position table has {table.shape[0]} rows; window {old_window[0]}x{old_window[1]} needs "
            f"{height * width + 3}"
        )
    down = spline_matrix(old_window[0], new_window[0]).to(table.device)
    across = spline_matrix(old_window[1], new_window[1]).to(table.device)
    sheet = table[:-3].to(torch.float64).view(height, width, -1)
    resized = torch.einsum("ya,abh,xb->yxh", down, sheet, across).flatten(0, 1)
    return torch.cat((resized.to(table.dtype), table[-3:]))


def resize_position_embedding(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """An absolute position embedding (1, h*w + 1, D) for another grid: bicubic, the CLS slot kept; differentiable."""
    if old_grid == new_grid:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    sheet = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(sheet.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((cls, resized.to(pos_embed.dtype).permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
