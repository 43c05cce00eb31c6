"""Linear layers whose weights were cast beforehand, against fp64 and against what autocast does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.kernels import use_backend
from beit_fast.kernels.half_linear import half_dtype, half_linear
from beit_fast.nn.block import cast_weights

Check = Callable[[str, Tensor, Tensor, Tensor], None]
HALVES = [torch.float16, torch.bfloat16]


def leaves(dtype: torch.dtype, device: str) -> list[Tensor]:
    """x (4, 33, 48) in half precision, weight (60, 48), first and last bias (20,) each, fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 33, 48), (60, 48), (20,), (20,))
    x, *rest = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [x.to(dtype).requires_grad_(), *(t.requires_grad_() for t in rest)]


def with_middle(first: Tensor, last: Tensor) -> Tensor:
    return torch.cat((first, torch.zeros_like(first), last))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_accuracy(dtype: torch.dtype, with_bias: bool, device: str, assert_accurate: Check) -> None:
    """Gradients of the fp32 parameters are fp32, and no further from fp64 than autocast's, which are rounded."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    wanted = leaves(dtype, device)[: 4 if with_bias else 2]
    grad = torch.randn(4, 33, 60, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def eager(x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=x.dtype != torch.float64):
            return F.linear(x, weight, with_middle(*biases) if biases else None)

    def ours(x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
        bias = with_middle(*biases).detach().to(dtype) if biases else None
        return half_linear(x, weight, weight.detach().to(dtype), bias, *biases)

    def run(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    exact = run(eager, [t.detach().double().requires_grad_() for t in wanted], grad.double())
    names = ("out", "x", "weight", "first bias", "last bias")
    for name, *three in zip(
        names, run(ours, wanted, grad), run(eager, wanted, grad), exact, strict=False
    ):  # fmt: skip
        assert_accurate(name, *three)


def test_dispatch_and_what_needs_no_gradient() -> None:
    x, weight, first, last = leaves(torch.bfloat16, "cpu")
    half, bias = weight.detach().bfloat16(), with_middle(first, last).detach().bfloat16()
    torch.library.opcheck(torch.ops.beit_fast.half_linear, (x, weight, half, bias, first, last))
    weight.requires_grad_(False)
    half_linear(x.detach(), weight, half, bias, first, last.detach()).sum().backward()
    assert first.grad is not None
    assert torch.equal(first.grad, torch.full((20,), 4.0 * 33))
    assert weight.grad is last.grad is None
    half_linear(x, weight, half, None, first, last).sum().backward()  # no bias was added: it has no gradient
    assert torch.equal(first.grad, torch.full((20,), 4.0 * 33))


def test_only_where_it_is_a_gain(triton_device: str) -> None:
    """Not without autocast, beside plain torch, or for weights of another dtype."""
    x, weight = torch.zeros(2, 3, device=triton_device), torch.zeros(4, 3, device=triton_device)
    assert half_dtype(x, [weight]) is None
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        assert half_dtype(x, [weight]) == torch.bfloat16
        assert half_dtype(x, []) is half_dtype(x, [weight, weight.bfloat16()]) is None
        with use_backend("reference"):
            assert half_dtype(x, [weight]) is None


def test_a_model_with_weights_cast_once(triton_device: str, assert_accurate: Check) -> None:
    """Outputs are those of autocast bit for bit; gradients of weights are at least as close to fp64."""
    torch.manual_seed(0)
    config = BeitConfig(image_size=32, width=32, depth=2, num_heads=1, vocab_size=64, layer_scale_init=0.1)
    model = BeitForMaskedImageModeling(config).train().to(triton_device)
    images = torch.randn(2, 3, 32, 32).to(triton_device)
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]]).to(triton_device)
    tokens = torch.randint(0, 64, (2, 4)).to(triton_device)

    def step(dtype: torch.dtype, cast_once: bool) -> dict[str, Tensor]:
        model.bias_within_blocks = not cast_once
        model.zero_grad()
        with torch.autocast(triton_device, dtype=dtype, enabled=dtype != torch.float64):
            assert (cast_weights(model.layers(), images)[0] is not None) == (dtype != torch.float64)
            loss = model(images.to(model.cls_token.dtype), mask, tokens).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

    once, each = step(torch.bfloat16, True), step(torch.bfloat16, False)
    model.double()
    with use_backend("reference"):
        exact = step(torch.float64, False)
    assert torch.equal(once["loss"], each["loss"])
    assert once.keys() == each.keys() == exact.keys()
    for name in exact:
        assert_accurate(name, once[name], each[name], exact[name])
