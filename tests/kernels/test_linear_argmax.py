"""linear_argmax against its definition in float64, brute force in NumPy, and what ties and odd sizes must give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels import use_backend
from beit_fast.kernels.linear_argmax import cpu, linear_argmax
from beit_fast.kernels.linear_argmax.op import MAX_WIDTH

SIZES = [(70, 32, 300), (5, 1, 3), (33, 17, 64), (1, 128, 129), (64, 48, 1), (0, 32, 20)]
"""P, C, V: none a multiple of the tiles, one code, one dimension, no rows."""


def make(P: int, C: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(n, C, generator=generator) for n in (P, V))
    return F.normalize(rows), F.normalize(weight), 0.1 * torch.randn(V, generator=generator)


def assert_largest(ids: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> None:
    """The chosen logit in fp64 is the largest but for the rounding of both: fp32 sums of C products and a bias."""
    assert ids.dtype == torch.int64
    assert ids.shape == rows.shape[:1]
    if not len(rows):
        return
    logits = rows.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    chosen = logits[np.arange(len(rows)), ids.cpu().numpy()]
    unit = torch.finfo(torch.float32).eps * (rows.shape[1] + 1)
    error = unit * (np.abs(rows.double().numpy()) @ np.abs(weight.double().numpy()).T + np.abs(bias.numpy())).max(1)
    assert (logits.max(1) - chosen <= 2 * error).all()
    second = np.sort(logits, 1)[:, -2] if logits.shape[1] > 1 else np.full(len(logits), -np.inf)
    clear = logits.max(1) - second > 2 * error
    assert clear.mean() > 0.9, "near-ties everywhere: the next line would show nothing"
    assert (ids.cpu().numpy()[clear] == logits.argmax(1)[clear]).all()


@pytest.mark.parametrize("sizes", SIZES)
def test_on_cpu(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight, bias = make(*sizes)
    ids = linear_argmax(rows, weight, bias)
    assert_largest(ids, rows, weight, bias)
    monkeypatch.setitem(cpu.LOGIT_BYTES, "cpu", 7 * 4 * sizes[2])  # seven rows at a time
    assert_largest(linear_argmax(rows, weight, bias), rows, weight, bias)
    with use_backend("reference"):
        assert_largest(linear_argmax(rows, weight, bias), rows, weight, bias)


@pytest.mark.parametrize("sizes", SIZES)
def test_triton(sizes: tuple[int, int, int], triton_device: str, dirty_memory: None) -> None:
    rows, weight, bias = make(*sizes)
    assert_largest(linear_argmax(*(t.to(triton_device) for t in (rows, weight, bias))), rows, weight, bias)


def test_rows_in_half_precision_and_in_any_layout(triton_device: str) -> None:
    rows, weight, bias = make(40, 32, 200)
    rows = rows.half()
    expected = linear_argmax(rows.float().to(triton_device), weight.to(triton_device), bias.to(triton_device))
    strided = torch.stack((rows, rows), 2).to(triton_device)[..., 0]
    columns = weight.t().contiguous().t().to(triton_device)
    assert not strided.is_contiguous()
    assert not columns.is_contiguous()
    assert torch.equal(linear_argmax(strided, columns, bias.to(triton_device)), expected)


def test_of_equal_codes_the_first(triton_device: str) -> None:
    """Each code three times, in tiles of their own; a row that is no number gets a valid code too."""
    rows, weight, _ = make(60, 32, 100)
    rows[7] = float("nan")
    repeated = torch.cat((weight, weight, weight)).to(triton_device)
    bias = torch.zeros(300, device=triton_device)
    ids = linear_argmax(rows.to(triton_device), repeated, bias).cpu()
    assert (ids < 100).all()
    known = torch.arange(60) != 7
    assert_largest(ids[known], rows[known], weight, torch.zeros(100))
    equal = torch.ones(3, 32, device=triton_device)
    assert linear_argmax(equal, torch.ones(90, 32, device=triton_device), bias[:90]).tolist() == [0, 0, 0]
    smallest = torch.full((90,), -3e38, device=triton_device)
    smallest[71] = -1e38
    assert linear_argmax(equal, torch.zeros(90, 32, device=triton_device), smallest).tolist() == [71, 71, 71]


def test_wide_products_are_left_to_the_library(triton_device: str) -> None:
    rows, weight, bias = make(20, MAX_WIDTH + 1, 50)
    assert_largest(linear_argmax(*(t.to(triton_device) for t in (rows, weight, bias))), rows, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_of_the_weight(dtype: torch.dtype) -> None:
    rows, weight, bias = make(40, 16, 30)
    weight, bias = weight.to(dtype), bias.to(dtype)
    expected = (rows.to(dtype).double() @ weight.double().t() + bias.double()).argmax(1)
    agreement = (linear_argmax(rows, weight, bias) == expected).double().mean()
    assert agreement == 1 if dtype == torch.float64 else agreement > 0.8


def test_op_check_and_compile() -> None:
    rows, weight, bias = make(9, 8, 20)
    torch.library.opcheck(torch.ops.beit_fast.linear_argmax, (rows, weight, bias, "cpu"))
    compiled = torch.compile(linear_argmax, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows, weight, bias), linear_argmax(rows, weight, bias))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (5, 3), (5,)), r"rows must be \(P, C\), weight \(V, C\) and bias \(V,\), got \(3, 4\), \(5, 3\)"),
        (((3, 4), (5, 4), (4,)), "and bias"),
        (((2, 3, 4), (5, 4), (5,)), "rows must be"),
        (((3, 4), (0, 4), (0,)), "at least one row"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_argmax(*(torch.zeros(shape) for shape in shapes))
