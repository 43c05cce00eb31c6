"""What the kernel tests share: the device that runs Triton, and the accuracy relation."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from beit_fast.kernels import backend, use_backend
from beit_fast.kernels.backend import interpreting

FLOORS = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4, torch.float32: 2e-6}


@pytest.fixture(params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")])
def triton_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device on which the Triton kernels run: a GPU, or the CPU where Triton programs are interpreted."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and not interpreting():
        pytest.skip("runs in a process of its own with TRITON_INTERPRET=1: test_interpreter.py")
    if request.param == "cuda" and interpreting():
        pytest.skip("TRITON_INTERPRET=1 keeps the kernels off the GPU")
    with use_backend("triton"):
        yield request.param


@pytest.fixture
def compiled_kernels() -> None:
    """For tests of what the CPU kernels of `csrc/` do and torch's operators do not."""
    if backend.compiled_module() is None:
        pytest.skip("beit_fast._C is not built")


@pytest.fixture
def assert_accurate() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """err(ours) <= max(1.2 err(eager), floor), both against fp64, as relative Frobenius norms."""

    def check(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, eager {eager.dtype}"
        assert ours.shape == exact.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(exact.shape)}"
        exact = exact.double().cpu()
        scale = exact.norm().clamp_min(1e-30)
        error = float((ours.detach().double().cpu() - exact).norm() / scale)
        bound = max(1.2 * float((eager.detach().double().cpu() - exact).norm() / scale), FLOORS[ours.dtype])
        assert error <= bound, f"{name}: relative error {error:.2e}, bound {bound:.2e}"

    return check


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Every buffer that is asked for without contents arrives full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
