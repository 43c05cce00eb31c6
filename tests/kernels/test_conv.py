"""The passes of a convolutional encoder against their definitions, and the exact arg-max against fp64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels import use_backend
from beit_fast.kernels.conv import ExactHead, bias_relu, conv_relu, cpu, exact_argmax, pixel_conv, pool_bias_relu

Check = Callable[[str, Tensor, Tensor, Tensor], None]
HALVES = [torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(name: str, dtype: torch.dtype, device: str) -> tuple[Callable[..., Tensor | tuple[Tensor, ...]], list]:
    """An operation and its arguments; odd sizes, so that every tile has a rest."""
    fp32 = torch.promote_types(dtype, torch.float32)
    bias = draw(37, seed=1).to(device, fp32)
    if name == "bias_relu":
        return bias_relu, [draw(5, 13, 37).to(device, dtype), bias]
    if name == "pool_bias_relu":
        return pool_bias_relu, [draw(3, 6, 10, 37).to(device, dtype), bias]
    if name == "conv_relu":
        x = draw(2, 5, 6, 9).to(device, dtype, memory_format=torch.channels_last)
        return conv_relu, [x, draw(37, 5, 3, 3, seed=2, scale=0.2).to(device, dtype), bias.to(dtype)]
    images = draw(2, 3, 11, 7).abs().to(device, fp32)
    return pixel_conv, [images, draw(37, 3, 7, 7, seed=2, scale=0.1).to(device, dtype), bias, 0.8, 0.1]


def results(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    function, arguments = case(name, dtype, device)
    values = function(*arguments)
    return list(values) if isinstance(values, tuple) else [values]


OPS = ["bias_relu", "pool_bias_relu", "pixel_conv", "conv_relu"]


@pytest.mark.parametrize("name", OPS)
def test_equals_plain_torch_in_fp64(name: str) -> None:
    """Formulas written here anew, with torch's own layers."""
    arguments = case(name, torch.float64, "cpu")[1]
    x, *rest = arguments
    if name == "bias_relu":
        expected = [(x + rest[0]).clamp(min=0)]
    elif name == "pool_bias_relu":
        pooled = F.max_pool2d(x.permute(0, 3, 1, 2), 2) + rest[0][:, None, None]
        expected = [y.permute(0, 2, 3, 1) for y in (pooled, pooled.clamp(min=0))]
    elif name == "conv_relu":
        expected = [F.conv2d(x, *rest, padding=1).clamp(min=0)]
    else:
        weight, bias, scale, shift = rest
        y = F.conv2d(F.pad(scale * x + shift, [3] * 4), weight, bias)
        expected = [y.permute(0, 2, 3, 1), y.clamp(min=0).permute(0, 2, 3, 1)]
    with use_backend("reference"):
        defined = results(name, torch.float64, "cpu")
    for ours, definition, theirs in zip(results(name, torch.float64, "cpu"), defined, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(definition, theirs)


def compare(name: str, dtype: torch.dtype, device: str, check: Check) -> None:
    """Inputs in half precision, the definition in fp64 on the same values."""
    function, arguments = case(name, dtype, device)
    values = function(*arguments)
    ours = list(values) if isinstance(values, tuple) else [values]
    with use_backend("reference"):
        eager = results(name, dtype, device)
        wide = [t.double() if isinstance(t, Tensor) else t for t in arguments]
        if name == "pixel_conv":  # the mapped pixels are rounded to the weights' precision, as in the original
            wide[0] = ((0.8 * arguments[0] + 0.1).to(dtype).double() - 0.1) / 0.8
        values = function(*wide)
    exact = list(values) if isinstance(values, tuple) else [values]
    for number, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        check(f"{name} {number}", mine, theirs, truth)
        assert mine.isfinite().all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", OPS)
def test_accuracy_on_cpu(name: str, dtype: torch.dtype, assert_accurate: Check) -> None:
    compare(name, dtype, "cpu", assert_accurate)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", OPS)
def test_triton(
    name: str, dtype: torch.dtype, triton_device: str, assert_accurate: Check, dirty_memory: None
) -> None:  # fmt: skip
    compare(name, dtype, triton_device, assert_accurate)


@pytest.mark.parametrize("name", ["bias_relu", "pool_bias_relu", "pixel_conv"])
def test_dispatch(name: str) -> None:
    _, arguments = case(name, torch.float32, "cpu")
    op = getattr(torch.ops.beit_fast, name)
    torch.library.opcheck(op, (*arguments, "cpu"))


def test_odd_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="even H and W"):
        pool_bias_relu(torch.zeros(1, 3, 4, 2), torch.zeros(2))


def test_nothing_to_do(triton_device: str) -> None:
    empty = torch.zeros(0, 4, 4, 8, dtype=torch.float16, device=triton_device)
    bias = torch.zeros(8, device=triton_device)
    assert bias_relu(empty, bias).shape == (0, 4, 4, 8)
    assert pool_bias_relu(empty, bias)[0].shape == (0, 2, 2, 8)


# The exact arg-max.


def near_ties(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A vocabulary in which most columns have twins that differ by a little more or less than half precision tells."""
    twins = torch.arange(len(weight) // 2)
    step = torch.logspace(-7, -3, len(twins), dtype=torch.float64)[:, None] * draw(len(twins), weight.shape[1], seed=7)
    weight[len(weight) // 2 :][: len(twins)] = (weight[twins].double() * (1 + step)).float()
    bias[len(weight) // 2 :][: len(twins)] = bias[twins]
    return weight, bias


def make_head(P: int, C: int, V: int, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as they come out of a ReLU, fp32 values."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(P, C, generator=generator).relu()
    weight = torch.randn(V, C, generator=generator) / math.sqrt(C)
    bias = torch.randn(V, generator=generator) / 10
    return rows, *(near_ties(rows, weight, bias) if ties else (weight, bias))


def assert_exact(ids: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, least: float) -> None:
    """Every row has the largest fp64 logit; at least a share of the rows is told apart by fp64 at all."""
    decided = 0
    for part, found in zip(rows.split(1000), ids.split(1000), strict=True):
        logits = torch.addmm(bias.double(), part.double(), weight.double().t())
        best = logits.topk(2, 1)
        rounding = 1e-12 * part.double().norm(dim=1) * weight.double().norm(dim=1).amax() + 1e-13
        clear = best.values[:, 0] - best.values[:, 1] > rounding
        assert torch.equal(found[clear], best.indices[clear, 0])
        chosen = logits.gather(1, found[:, None])[:, 0]
        assert (best.values[:, 0] - chosen <= rounding).all()
        decided += int(clear.sum())
    assert decided >= least * len(rows)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_exact_argmax_on_cpu(dtype: torch.dtype, ties: bool) -> None:
    rows, weight, bias = make_head(700, 96, 1000, ties)
    rows = rows.to(dtype)
    head = ExactHead.of(weight, bias, dtype)
    ids = exact_argmax(rows, head, 1 << 20)
    assert_exact(ids, rows, weight, bias, 0.9 if ties else 1.0)
    plain = (rows.float() @ head.half.float().t() + bias).argmax(1)
    if ties or dtype == torch.bfloat16:
        assert (plain != ids).any(), "half precision alone must give other tokens, or the test shows nothing"
    assert torch.equal(exact_argmax(rows, head, 7 * 1000 * 4), ids)  # seven rows at a time
    with use_backend("reference"):
        assert_exact(exact_argmax(rows, head, 1 << 20), rows, weight, bias, 0.9 if ties else 1.0)


@pytest.mark.parametrize("ties", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("dtype", HALVES)
def test_exact_argmax_triton(dtype: torch.dtype, ties: bool, triton_device: str, dirty_memory: None) -> None:
    rows, weight, bias = make_head(60, 48, 700, ties)
    rows = rows.to(dtype)
    head = ExactHead.of(weight.to(triton_device), bias.to(triton_device), dtype)
    ids = exact_argmax(rows.to(triton_device), head, 1 << 30).cpu()
    assert_exact(ids, rows, weight, bias, 0.9)


def test_equal_logits_and_what_is_not_a_number(triton_device: str) -> None:
    """The first of equal columns; and always a valid column."""
    weight = torch.ones(10, 8, device=triton_device)
    head = ExactHead.of(weight, torch.zeros(10, device=triton_device), torch.float16)
    rows = torch.ones(4, 8, dtype=torch.float16, device=triton_device)
    rows[1] = math.nan
    rows[2] = 60000.0
    ids = exact_argmax(rows, head, 1 << 20).cpu()
    assert ids[[0, 2, 3]].tolist() == [0, 0, 0]
    assert 0 <= ids[1] < 10
    assert exact_argmax(rows[:0], head, 1 << 20).shape == (0,)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_bound_holds_and_is_not_wasteful(dtype: torch.dtype) -> None:
    """No logit errs by more than the bound, which is at most 40 times the largest error that occurs."""
    rows, weight, bias = make_head(400, 512, 600, ties=False)
    rows = rows.to(dtype)
    head = ExactHead.of(weight, bias, dtype)
    exact = torch.addmm(bias.double(), rows.double(), weight.double().t())
    logits = cpu.products(rows, head.half) + bias
    error = (logits.double() - exact).abs().amax(1)
    bound = rows.double().norm(dim=1) * head.slack + logits.abs().amax(1) * cpu.SUM_ERROR
    assert (error <= bound).all()
    assert (bound / error).median() < 40
    rows[0] = (weight[5] - head.half[5].float()).to(dtype)  # the direction in which the rounding of column 5 is largest
    worst = (rows[0].double() @ (weight[5].double() - head.half[5].double())).abs()
    assert worst <= rows[0].double().norm() * head.slack


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("P", "C", "V"), [(20_000, 2048, 8192), (1_000_000, 64, 512)])
def test_exact_argmax_on_many_rows(P: int, C: int, V: int, ties: bool) -> None:
    rows, weight, bias = make_head(P, C, V, ties)
    rows = rows.half()
    ids = exact_argmax(rows, ExactHead.of(weight, bias, torch.float16), 128 << 20)
    assert_exact(ids, rows, weight, bias, 0.9)
