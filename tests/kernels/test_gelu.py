"""bias_gelu against its definition, and against torch's exact GELU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels import backend, bias_gelu, use_backend

Check = Callable[[str, Tensor, Tensor, Tensor], None]
Inputs = tuple[Tensor, Tensor | None]


def make(shape: tuple[int, ...], bias: bool, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    b = torch.randn(shape[-1:], generator=generator, dtype=torch.float64)
    return x.to(device), b.to(device) if bias else None


def run(inputs: Inputs) -> dict[str, Tensor]:
    x, bias = (None if t is None else t.detach().clone().requires_grad_() for t in inputs)
    assert x is not None
    y = bias_gelu(x, bias)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y))
    found = {"y": y.detach(), "d x": x.grad}
    if bias is not None:
        found["d bias"] = bias.grad
    return found  # type: ignore[return-value]


def compare(inputs: Inputs, dtype: torch.dtype, parameters: torch.dtype, check: Check) -> None:
    x, bias = inputs[0].to(dtype), None if inputs[1] is None else inputs[1].to(parameters)
    ours = run((x, bias))
    with use_backend("reference"):
        eager = run((x, bias))
        exact = run((x.double(), None if bias is None else bias.double()))
    for name in exact:
        check(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_in_fp64(bias: bool) -> None:
    x, b = make((2, 5, 24), bias)
    torch.testing.assert_close(bias_gelu(x, b), F.gelu(x if b is None else x + b))
    leaf = x.clone().requires_grad_()
    extra = () if b is None else (b.clone().requires_grad_(),)
    assert torch.autograd.gradcheck(lambda t, *u: bias_gelu(t, *u or (None,)), (leaf, *extra))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_accuracy_on_cpu(bias: bool, dtype: torch.dtype, parameters: torch.dtype, assert_accurate: Check) -> None:
    compare(make((3, 33, 96), bias), dtype, parameters, assert_accurate)
    compare(make((3, 331, 35), bias), dtype, parameters, assert_accurate)  # more than a compiled kernel leaves alone


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_kernel_in_fp32(bias: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64, at widths that are no whole vectors, and from the far tails to the middle."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((1, 33000, 1), (3, 365, 37), (2, 300, 64)):
            x, b = make(shape, bias)
            x = (x * 4).float()
            x.view(-1)[:6] = torch.tensor([-1e30, -37.0, -13.5, 0.0, 13.5, 1e30])
            inputs = (x, None if b is None else b.float())
            exact = run((x.double(), None if b is None else inputs[1].double()))  # type: ignore[union-attr]
            ours = run(inputs)
            with monkeypatch.context() as without:
                without.setattr(backend, "compiled_module", lambda: None)
                plain = run(inputs)
            assert not torch.equal(ours["d x"], plain["d x"])  # the compiled kernel ran
            for name, value in exact.items():
                atol = 1e-4 if name == "d bias" else 3e-7
                torch.testing.assert_close(ours[name].double(), value, atol=atol, rtol=5e-7)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled_kernels")
def test_what_is_not_finite_stays_so() -> None:
    x = torch.zeros(130, 300)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    x.requires_grad_()
    y = bias_gelu(x, None)
    y.sum().backward()
    assert y[0, 0].isnan()
    assert y[0, 1] == float("inf")
    assert not y[0, 2].isfinite()  # torch's is NaN, too
    assert x.grad is not None
    assert x.grad[0, 0].isnan()
    assert torch.equal(x.grad[1:], torch.full((129, 300), 0.5))


@pytest.mark.usefixtures("compiled_kernels")
def test_dispatch() -> None:
    x, b = (t.float().requires_grad_() for t in make((2, 3, 8), True))  # type: ignore[union-attr]
    many = torch.randn(4100, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for inputs in ((x, b), (x, None), (many, b)):
        torch.library.opcheck(torch.ops.beit_fast.bias_gelu, (*inputs, False, "cpu"))


@pytest.mark.parametrize(("dtype", "num_tokens"), [(torch.float64, 5), (torch.float32, 1500)])
@pytest.mark.parametrize("bias", [True, False])
def test_compiles_without_a_break(bias: bool, dtype: torch.dtype, num_tokens: int) -> None:
    inputs = tuple(None if t is None else t.to(dtype) for t in make((3, num_tokens, 8), bias))
    x, b = (None if t is None else t.clone().requires_grad_() for t in inputs)
    torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")(x, b).sum().backward()
    x2, b2 = (None if t is None else t.clone().requires_grad_() for t in inputs)
    F.gelu(x2 if b2 is None else x2 + b2).sum().backward()  # type: ignore[operator, arg-type]
    torch.testing.assert_close(x.grad, x2.grad)  # type: ignore[union-attr]
    if bias:
        torch.testing.assert_close(b.grad, b2.grad)  # type: ignore[union-attr]


def test_inputs_stay_as_they_were_and_a_second_backward_agrees() -> None:
    """The backward pass works in place of a buffer of its own, never of what it was given."""
    x, b = (t.clone().requires_grad_() for t in make((4, 7, 8), True))  # type: ignore[union-attr]
    kept = x.detach().clone()
    y = bias_gelu(x, b)
    first = torch.autograd.grad(y.sum(), (x, b), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, b))
    assert torch.equal(x.detach(), kept)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    leaf = x.detach().requires_grad_()
    expected = torch.autograd.grad(F.gelu(leaf + b.detach()).sum(), leaf)[0]
    torch.testing.assert_close(first[0], expected)
    torch.testing.assert_close(first[1], expected.sum((0, 1)))


def test_odd_layouts() -> None:
    x, b = make((4, 6, 8), True)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for name, value in run((turned, b)).items():
        torch.testing.assert_close(value, run((x, b))[name])
    flat = run((x[0, 0], b))
    torch.testing.assert_close(flat["d bias"], flat["d x"])
    assert torch.equal(run((x[:0], b))["d bias"], torch.zeros(8, dtype=torch.float64))
    assert torch.isfinite(bias_gelu(torch.tensor([-1e30, 0.0, 1e30]), None)).all()


def test_a_wrong_bias_is_named() -> None:
    with pytest.raises(ValueError, match="bias"):
        bias_gelu(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 8), (1, 9, 70)], ids=str)
def test_triton(triton_device: str, bias: bool, shape: tuple[int, ...], assert_accurate: Check) -> None:
    inputs = make(shape, bias, triton_device)
    compare(inputs, torch.float32, torch.float32, assert_accurate)
    compare(inputs, torch.bfloat16, torch.float32, assert_accurate)
    first, second = (run(inputs if i < 0 else (inputs[0].float(), inputs[1])) for i in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_triton_reads_nothing_unwritten(triton_device: str, dirty_memory: None, assert_accurate: Check) -> None:
    compare(make((2, 3, 24), True, triton_device), torch.float32, torch.float32, assert_accurate)


@pytest.mark.parametrize("D", [pytest.param(3072, marks=pytest.mark.slow, id="BEiT-B")])
def test_triton_model_width(triton_device: str, D: int, assert_accurate: Check) -> None:
    compare(make((2, 17, D), True, triton_device), torch.bfloat16, torch.float32, assert_accurate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_taken_over_only_where_allowed(dtype: torch.dtype) -> None:
    x, bias = (t.to(dtype) for t in make((2, 5, 24), True))  # type: ignore[union-attr]
    kept, expected = x.clone(), bias_gelu(x, bias)
    with torch.no_grad():
        assert torch.equal(bias_gelu(x, bias), expected)
        wide = torch.zeros(2, 5, 48, dtype=dtype)
        wide[..., :24] = x
        assert torch.equal(bias_gelu(wide[..., :24], bias, may_overwrite=True), expected)
        assert torch.equal(wide[..., :24], x)
        leaf = x.clone().requires_grad_()
        assert torch.equal(bias_gelu(leaf, bias, may_overwrite=True), expected)
        assert torch.equal(leaf, kept)
        assert torch.equal(x, kept)
        taken = bias_gelu(x, bias, may_overwrite=True)
    assert torch.equal(taken, expected)
    assert taken.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_taken_over_gives_the_same_gradients(frozen: bool) -> None:
    """The derivative lies where the product was, and nobody's gradient reads that product."""
    rows, bias = (t.float() for t in make((2, 70, 240), True))  # type: ignore[union-attr]
    weight = torch.randn(240, 240, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    found = []
    for may_overwrite in (False, True):
        leaves = [t.clone().requires_grad_(not (frozen and t is weight)) for t in (rows, weight, bias)]
        product = leaves[0] @ leaves[1]
        before = product.detach().clone()
        out = bias_gelu(product, leaves[2], may_overwrite=may_overwrite)
        assert torch.equal(product.detach(), before) != may_overwrite
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_memory_that_another_gradient_reads_is_no_silent_mistake() -> None:
    """Whoever allows it wrongly hears of it from torch, which counts the versions of what it saved."""
    x, bias = (t.float() for t in make((2, 70, 240), True))  # type: ignore[union-attr]
    read = x.requires_grad_().exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        bias_gelu(read, bias, may_overwrite=True).sum().backward()
