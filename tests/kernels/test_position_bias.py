"""The relative position bias against a count by hand, its definition, and the golden values of the released models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from beit_fast import kernels
from beit_fast.kernels import relative_position_bias, relative_position_index, use_backend
from beit_fast.kernels.position_bias import cpu, reference

WINDOWS = [(1, 1), (1, 4), (2, 2), (3, 2), (4, 7), (14, 14), (8, 17), (3, 90)]


def table_of(window: tuple[int, int], heads: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(window[0] * 100 + window[1])
    return torch.randn(reference.table_rows(window), heads, generator=generator, dtype=torch.float64).to(dtype)


def fold_by_hand(grad: Tensor, window: tuple[int, int]) -> Tensor:
    """The table gradient, pair by pair."""
    height, width = window
    folded = grad.new_zeros(reference.table_rows(window), grad.shape[0])
    tokens = [None, *((r, c) for r in range(height) for c in range(width))]
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            if query is None:
                row = -1 if key is None else -3
            elif key is None:
                row = -2
            else:
                row = (query[0] - key[0] + height - 1) * (2 * width - 1) + query[1] - key[1] + width - 1
            folded[row] += grad[:, i, j]
    return folded


def test_index_of_the_released_models() -> None:
    index = relative_position_index((14, 14))
    assert index.shape == (197, 197)
    golden = {(0, 0): 731, (0, 1): 729, (1, 0): 730, (1, 1): 364, (1, 2): 363, (1, 3): 362, (1, 15): 337, (196, 1): 728}
    assert {place: int(index[place]) for place in golden} == golden


@pytest.mark.parametrize("few_patches", [0, 256], ids=["runs", "pairs"])
@pytest.mark.parametrize("window", WINDOWS)
def test_bias_and_gradient(window: tuple[int, int], few_patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is a copy, bit for bit; the gradient equals the sum pair by pair; both backends agree."""
    monkeypatch.setattr(cpu, "FEW_PATCHES", few_patches)
    table = table_of(window).requires_grad_()
    bias = relative_position_bias(table, window)
    assert bias.is_contiguous()
    assert torch.equal(bias, table[relative_position_index(window)].permute(2, 0, 1))
    grad = torch.randn(bias.shape, dtype=bias.dtype, generator=torch.Generator().manual_seed(1))
    (folded,) = torch.autograd.grad(bias, table, grad)
    torch.testing.assert_close(folded, fold_by_hand(grad, window), rtol=1e-12, atol=1e-12)
    with use_backend("reference"):
        plain = relative_position_bias(table, window)
    assert torch.equal(plain, bias)
    torch.testing.assert_close(folded, torch.autograd.grad(plain, table, grad)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_low_precision(dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    window = (7, 5)
    table = table_of(window, dtype=dtype).requires_grad_()
    bias = relative_position_bias(table, window)
    grad = torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (ours,) = torch.autograd.grad(bias, table, grad)
    (eager,) = torch.autograd.grad(reference.relative_position_bias(table, window), table, grad)
    assert_accurate("table", ours, eager, fold_by_hand(grad.double(), window))


@pytest.mark.parametrize("few_patches", [0, 256], ids=["runs", "pairs"])
def test_gradient_is_repeatable_and_additive(few_patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs agree bit for bit, whatever the gradient's strides; gradients of two halves of a batch add up."""
    monkeypatch.setattr(cpu, "FEW_PATCHES", few_patches)
    window = (5, 6)
    table = table_of(window, dtype=torch.float32).requires_grad_()
    grads = torch.randn(2, 3, 31, 31, generator=torch.Generator().manual_seed(3))

    def fold(grad: Tensor) -> Tensor:
        return torch.autograd.grad(relative_position_bias(table, window), table, grad)[0]

    first = fold(grads[0])
    assert torch.equal(first, fold(grads[0].clone()))
    assert torch.equal(first, fold(grads[0].transpose(1, 2).contiguous().transpose(1, 2)))
    assert torch.equal(fold(torch.ones(1).expand(3, 31, 31)), fold(torch.ones(3, 31, 31)))
    torch.testing.assert_close(first + fold(grads[1]), fold(grads.sum(0)), rtol=1e-5, atol=1e-5)


def test_autograd_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEW_PATCHES", 0)
    table = table_of((2, 3), heads=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: relative_position_bias(t, (2, 3)), (table,))
    torch.library.opcheck(torch.ops.beit_fast.relative_position_bias.default, (table, 2, 3, "cpu"))
    compiled = torch.compile(lambda t: relative_position_bias(t, (2, 3)).square(), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(table).sum(), table)
    (eager,) = torch.autograd.grad(relative_position_bias(table, (2, 3)).square().sum(), table)
    torch.testing.assert_close(ours, eager)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(relative_position_bias(table, (2, 3)).square().sum(), table, create_graph=True)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="732 rows but a window of 13 x 14 needs 678"):
        relative_position_bias(torch.zeros(732, 12), (13, 14))
    with pytest.raises(ValueError, match="window_size"):
        relative_position_bias(torch.zeros(4, 12), (0, 1))
    with pytest.raises(ValueError, match="floating"):
        relative_position_bias(torch.zeros(4, 12, dtype=torch.int64), (1, 1))


@pytest.mark.parametrize(
    ("window", "dtype"), [((1, 2), torch.float32), ((5, 3), torch.float32), ((14, 14), torch.bfloat16)]
)
def test_kernels(
    window: tuple[int, int], dtype: torch.dtype, triton_device: str, assert_accurate: Callable[..., None]
) -> None:
    table = table_of(window, dtype=dtype).to(triton_device).requires_grad_()
    bias = kernels.relative_position_bias(table, window)
    eager = reference.relative_position_bias(table, window)
    assert torch.equal(bias, eager)
    grad = torch.randn(bias.shape, generator=torch.Generator().manual_seed(4)).to(triton_device, dtype)
    (ours,) = torch.autograd.grad(bias, table, grad, retain_graph=True)
    exact = torch.zeros(table.shape, dtype=torch.float64, device=triton_device)
    exact.index_put_(
        (relative_position_index(window).to(triton_device),), grad.double().permute(1, 2, 0), accumulate=True
    )
    assert_accurate("table", ours, torch.autograd.grad(eager, table, grad)[0], exact)
    assert torch.equal(ours, torch.autograd.grad(bias, table, grad)[0])
