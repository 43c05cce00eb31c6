"""Matrix products in fp32 on a CPU: whichever library makes them, they are those of `torch.nn.functional.linear`."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import kernels
from beit_fast.kernels import linear as public
from beit_fast.kernels import matmul as module
from beit_fast.kernels import use_backend

Check = Callable[[str, Tensor, Tensor, Tensor], None]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(params=[pytest.param(True, id="onednn", marks=needs_onednn), pytest.param(False, id="mkl")])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size by one of the two libraries, whatever this processor prefers."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(module, "_FEW_MULTIPLY_ADDS", 0)


def inputs_of(*shape: int, out: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x (..., K), weight (N, K), bias (N,) and a gradient (..., N)."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (out, shape[-1]), (out,), (*shape[:-1], out))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def run(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    wanted = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = function(*wanted)
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


@pytest.mark.parametrize("shape", [(3, 17, 48), (50, 33), (1, 1, 8), (2, 3, 5, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_accuracy(library: None, shape: tuple[int, ...], with_bias: bool, assert_accurate: Check) -> None:
    x, weight, bias, grad = inputs_of(*shape, out=40)
    given = bias if with_bias else None
    exact = run(F.linear, x.double(), weight.double(), None if given is None else given.double(), grad.double())
    for name, *three in zip(
        ("out", "x", "weight", "bias"), run(public, x, weight, given, grad), run(F.linear, x, weight, given, grad),
        exact, strict=False,
    ):  # fmt: skip
        assert_accurate(name, *three)
    with torch.no_grad():
        assert_accurate("inference", public(x, weight, given), F.linear(x, weight, given), exact[0])


def test_strided_inputs(library: None, assert_accurate: Check) -> None:
    x, weight, bias, grad = inputs_of(6, 20, 32, out=24)
    sliced = torch.zeros(12, 20, 64)
    sliced[::2, :, 16:48] = x
    layouts = [(sliced[::2, :, 16:48], weight, grad), (x.transpose(0, 1).contiguous().transpose(0, 1), weight, grad),
               (x, weight.t().contiguous().t(), grad), (x, weight, grad.new_ones(1).expand_as(grad))]  # fmt: skip
    for x_, weight_, grad_ in layouts:
        exact = run(F.linear, x_.double(), weight_.double(), bias.double(), grad_.double())
        usual = run(F.linear, x_, weight_, bias, grad_)
        for name, *three in zip(("out", "x", "weight", "bias"), run(public, x_, weight_, bias, grad_), usual, exact,
                                strict=True):  # fmt: skip
            assert_accurate(name, *three)


def test_product_of_two_matrices(library: None, assert_accurate: Check) -> None:
    a, b, bias, _ = inputs_of(30, 20, out=16)
    assert_accurate(
        "product",
        module.matmul(a, b.t(), bias),
        torch.addmm(bias, a, b.t()),
        a.double() @ b.double().t() + bias.double(),
    )
    assert_accurate("transposed", module.matmul(a.t(), a), a.t() @ a, a.double().t() @ a.double())


def test_only_what_is_asked_for(library: None) -> None:
    """A frozen weight gets no gradient, and a second derivative is right."""
    x, weight, bias, grad = inputs_of(4, 10, out=6)
    x.requires_grad_()
    out = public(x, weight, bias)
    out.backward(grad)
    assert weight.grad is None
    assert bias.grad is None
    torch.testing.assert_close(x.grad, grad @ weight)
    weight.requires_grad_()
    (first,) = torch.autograd.grad(public(x, weight, bias).square().sum(), x, create_graph=True)
    (ours,) = torch.autograd.grad(first.square().sum(), weight)
    (first,) = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), x, create_graph=True)
    (usual,) = torch.autograd.grad(first.square().sum(), weight)
    torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-3)


def test_twice_the_same_bits(library: None) -> None:
    inputs = inputs_of(3, 65, 96, out=64)
    first, second = run(public, *inputs), run(public, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_left_to_torch(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, autocast, tracing and the reference backend never meet oneDNN."""
    monkeypatch.setattr(module, "_onednn", None)  # calling it fails
    x, weight, bias, _ = inputs_of(4, 10, out=6)
    for dtype in (torch.float64, torch.bfloat16):
        public(x.to(dtype), weight.to(dtype), bias.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert public(x, weight, bias).dtype == torch.bfloat16
    with use_backend("reference"):
        assert torch.equal(public(x, weight, bias), F.linear(x, weight, bias))
    compiled = torch.compile(lambda x: kernels.linear(x, weight, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), F.linear(x, weight, bias))
