"""Position parameters for another input size than the one they were learned at."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.kernels.backend import constant_in_graphs, select
from beit_fast.kernels.registration import constant, fused_op, is_traced


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


def _second_derivatives(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(s, s) map from values at the knots x to second derivatives of the not-a-knot cubic spline through them."""
    count = x.shape[0]
    h = np.diff(x)
    system = np.zeros((count, count))
    rhs = np.zeros((count, count))
    for i in range(1, count - 1):
        system[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        rhs[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    # Not-a-knot: the third derivative is continuous at the second and at the last but one knot.
    system[0, :3] = h[1], -(h[0] + h[1]), h[0]
    system[-1, -3:] = h[-1], -(h[-2] + h[-1]), h[-2]
    return np.linalg.solve(system, rhs).astype(np.float64)


@functools.lru_cache(maxsize=64)
def _spline(source: int, target: int) -> NDArray[np.float64]:
    s, d = 2 * source - 1, 2 * target - 1
    if s == d:
        return np.eye(s)
    rows = np.arange(d)
    if s < 5:  # fewer knots than a not-a-knot spline has conditions for: nothing was learned to interpolate
        nearest = np.zeros((d, s))
        nearest[rows, (rows - d // 2).clip(-(s // 2), s // 2) + s // 2] = 1.0
        return nearest
    distances = np.cumsum(_geometric_ratio(s, d) ** np.arange(s // 2))
    x = np.concatenate((-distances[::-1], [0.0], distances))
    at = np.arange(-(d // 2), d // 2 + 1, dtype=np.float64).clip(x[0], x[-1])
    cell = (np.searchsorted(x, at, side="right") - 1).clip(0, s - 2)
    h = np.diff(x)[cell]
    right = (at - x[cell]) / h
    left = 1.0 - right
    linear, curvature = np.zeros((d, s)), np.zeros((d, s))
    linear[rows, cell] += left
    linear[rows, cell + 1] += right
    curvature[rows, cell] += (left**3 - left) * h**2 / 6
    curvature[rows, cell + 1] += (right**3 - right) * h**2 / 6
    return linear + curvature @ _second_derivatives(x)


@constant
def _on_device(source: int, target: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_spline(source, target)).to(device)


def spline_matrix(source: int, target: int, device: torch.device | str = "cpu") -> Tensor:
    """The constant (2*target-1, 2*source-1) float64 matrix that resizes one axis of a relative position table.

    Knots lie at geometrically growing distances from offset 0, so that the nearest offsets are copied exactly; values
    outside the source range clamp to its border. Applied to both axes it equals the official code's bicubic
    interpolating spline (SciPy's former `interp2d(kind="cubic")`). Computed once for each pair of sizes and device.

    Args:
        source, target: patches along the axis, at least 1.
    """
    return _on_device(source, target, torch.device(device))


@fused_op(
    "beit_fast::spline_matrix",
    fake=lambda table, source, target: table.new_empty(2 * target - 1, 2 * source - 1, dtype=torch.float64),
)
def _compiled_spline_matrix(table: Tensor, source: int, target: int) -> Tensor:
    return spline_matrix(source, target, table.device).clone()  # an op returns memory of its own


@constant_in_graphs
def _exported_spline_matrix(source: int, target: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_spline(source, target)).to(device)


def _spline_matrix_for(table: Tensor, source: int, target: int) -> Tensor:
    """`spline_matrix` on the table's device: in a compiled graph an op, in an exported or traced one a constant."""
    if torch.compiler.is_exporting():
        return _exported_spline_matrix(source, target, table.device)
    if torch.compiler.is_compiling():
        return _compiled_spline_matrix(table.detach(), source, target)
    if is_traced(table) or select("resize", table) == "reference":
        return torch.from_numpy(_spline(source, target)).to(table.device)  # not kept: it may be a tracer's
    return spline_matrix(source, target, table.device)


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

    Examples:
        >>> import torch
        >>> from beit_fast.models import resize_relative_position_bias_table
        >>> resize_relative_position_bias_table(torch.zeros(27 * 27 + 3, 12), (14, 14), (24, 24)).shape
        torch.Size([2212, 12])
    """
    if old_window == new_window:
        return table
    height, width = 2 * old_window[0] - 1, 2 * old_window[1] - 1
    if table.shape[0] != height * width + 3:
        raise ValueError(
            f"relative position table has {table.shape[0]} rows; window {old_window[0]}x{old_window[1]} needs "
            f"{height * width + 3}"
        )
    down, across = (_spline_matrix_for(table, old, new) for old, new in zip(old_window, new_window, strict=True))
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
