"""Which attention runs where, and that others under our signature compute the same."""

import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from beit_fast.kernels import backend, packed_attention, use_backend
from beit_fast.kernels.attention import backends, reference

GPU = torch.device("cuda", 0)


class Described(NamedTuple):
    """What the choice asks of a tensor, on a device that need not exist."""

    device: torch.device
    dtype: torch.dtype


def chosen(device: torch.device, dtype: torch.dtype, head_dim: int, with_bias: bool) -> str:
    tensor: Any = Described(device, dtype)
    return backend.select("biased_attention" if with_bias else "attention", tensor, head_dim=head_dim)


@pytest.fixture
def modern_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice as it falls on a GPU of compute capability 8.0 or newer."""
    monkeypatch.setattr(backend, "device_runs_triton", lambda index: True)
    monkeypatch.setattr(backend, "triton_installed", lambda: True)


@pytest.mark.parametrize(
    ("wanted", "dtype", "head_dim", "with_bias", "name"),
    [
        ("auto", torch.bfloat16, 64, True, "triton"),
        ("auto", torch.float16, 128, True, "triton"),
        ("auto", torch.bfloat16, 64, False, "sdpa"),
        ("triton", torch.bfloat16, 64, False, "triton"),
        ("auto", torch.bfloat16, 256, True, "sdpa"),
        ("auto", torch.float32, 64, True, "sdpa"),
        ("sdpa", torch.bfloat16, 64, True, "sdpa"),
        ("flex", torch.bfloat16, 64, True, "flex"),
        ("reference", torch.bfloat16, 64, True, "reference"),
    ],
)
def test_choice_on_a_modern_gpu(
    wanted: str,
    dtype: torch.dtype,
    head_dim: int,
    with_bias: bool,
    name: str,
    modern_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_chosen", wanted)
    assert chosen(GPU, dtype, head_dim, with_bias) == name


def test_choice_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    monkeypatch.setattr(backend, "device_runs_triton", lambda index: False)
    assert chosen(GPU, torch.float16, 64, True) == "sdpa"
    assert "8.0" in backend.obstacle(0)
    monkeypatch.setattr(backend, "triton_installed", lambda: False)
    assert chosen(GPU, torch.float16, 64, True) == "sdpa"
    assert backend.obstacle(0) == "Triton is not installed"
    assert chosen(torch.device("mps"), torch.float16, 64, True) == "sdpa"
    cpu = torch.device("cpu")
    assert chosen(cpu, torch.float32, 64, True) == "cpu"
    with use_backend("flex"):  # which has no gradient on a CPU
        assert chosen(cpu, torch.float32, 64, True) == "cpu"


@pytest.mark.parametrize(
    ("device", "modern", "name"),
    [("cuda", True, "triton"), ("cuda", False, "torch"), ("mps", True, "torch"), ("cpu", True, "cpu")],
)
def test_choice_of_the_other_ops(device: str, modern: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    monkeypatch.setattr(backend, "device_runs_triton", lambda index: modern)
    tensor: Any = Described(torch.device(device), torch.float32)
    assert backend.select("bias_gelu", tensor) == name
    with use_backend("sdpa"):
        assert backend.select("bias_gelu", tensor) == name
    with use_backend("reference"):
        assert backend.select("bias_gelu", tensor) == "reference"
    assert backend.select("bias_gelu", tensor._replace(dtype=torch.float64)) == ("cpu" if device == "cpu" else "torch")


@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_choice_is_traced_without_a_break(wanted: str, modern_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", wanted)

    def count(x: Tensor) -> Tensor:
        return x + len(chosen(GPU, torch.bfloat16, 64, True))

    torch._dynamo.reset()
    assert torch.compile(count, fullgraph=True, backend="eager")(torch.zeros(())) == len("triton")


def both_ways(name: str, device: str, dtype: torch.dtype, with_bias: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of one backend, and of the definition."""
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(3, 21, 3, 2, 32, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(2, 21, 21, generator=generator).to(device).requires_grad_() if with_bias else None
    grad = torch.randn(3, 21, 2, 32, generator=generator).to(device, dtype)
    leaves = [qkv] if bias is None else [qkv, bias]
    with use_backend(name):
        out = packed_attention(qkv, bias)
    exact = reference.biased_attention(*qkv.unbind(2), bias, 32**-0.5)
    return [out, *torch.autograd.grad(out, leaves, grad)], [exact, *torch.autograd.grad(exact, leaves, grad)]


@pytest.mark.parametrize("with_bias", [True, False])
def test_sdpa_on_a_cpu(with_bias: bool) -> None:
    torch.testing.assert_close(*both_ways("sdpa", "cpu", torch.float32, with_bias))


@pytest.fixture(params=["sdpa", "flex", "xformers"])
def other_on_gpu(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "xformers" and (reason := backend.xformers_obstacle()):
        pytest.skip(reason)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [True, False])
def test_others_on_a_gpu(other_on_gpu: str, with_bias: bool) -> None:
    ours, exact = both_ways(other_on_gpu, "cuda", torch.bfloat16, with_bias)
    for mine, theirs in zip(ours, exact, strict=True):
        assert float((mine.float() - theirs.float()).norm() / theirs.float().norm()) < 2e-2


@pytest.mark.slow
def test_flex_without_gradients_on_a_cpu() -> None:
    q, k, v = torch.randn(3, 2, 17, 2, 16, generator=torch.Generator().manual_seed(6))
    bias = torch.randn(2, 17, 17)
    with torch.no_grad():
        torch.testing.assert_close(backends.flex(q, k, v, bias, 0.3), reference.biased_attention(q, k, v, bias, 0.3))


def test_an_xformers_that_cannot_run_is_refused_in_one_line(monkeypatch):
    class Broken(ModuleType):
        @property
        def memory_efficient_attention(self):
            raise ImportError("undefined symbol: _ZN3c10\nmore lines")

    backend.xformers_obstacle.cache_clear()
    monkeypatch.setattr(backend, "xformers_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", Broken("xformers.ops"))
    try:
        with pytest.raises(ValueError, match=r"^backend 'xformers' cannot run here, .*: undefined symbol: _ZN3c10$"):
            use_backend("xformers")
        with pytest.raises(ValueError, match="cannot run here"), use_backend("xformers"):
            pass
    finally:
        backend.xformers_obstacle.cache_clear()
