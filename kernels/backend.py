"""Which implementation runs: the one place that probes Triton, xformers and the device.

`auto` (the default) lets every op take its fastest implementation for the tensor's device. The other names force one:
`reference` the plain formulas everywhere, `triton` our kernels, `sdpa`, `xformers` and `flex` another attention
(ops that have no such implementation keep their own).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import TracebackType

import torch

BACKENDS = ("auto", "reference", "triton", "sdpa", "xformers", "flex")
_MINIMUM_CAPABILITY = (8, 0)  # older tensor cores: Triton emits no matrix instructions for them

_chosen = "auto"


class use_backend:
    """Chooses the backend of every op: `use_backend("sdpa")` from now on, `with use_backend("sdpa"):` for a while.

    Raises:
        ValueError: the name is not one of `BACKENDS`, or what it needs is not installed here.

    Examples:
        >>> import beit_fast
        >>> with beit_fast.use_backend("reference"):
        ...     pass  # plain formulas: second derivatives work, and results can be compared
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if name == "triton" and not triton_installed():
            raise ValueError("backend 'triton' needs the triton package: pip install triton")
        if name == "xformers" and not xformers_installed():
            raise ValueError("backend 'xformers' needs the xformers package: pip install beit-fast[xformers]")
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def chosen_backend() -> str:
    """The name given to `use_backend`, or "auto".

    "reference" during an export, whose result must run without us, and within `torch.func.grad`, `vmap` and the like,
    which can follow the plain formulas only.
    """
    # what autograd.Function.apply itself asks before it refuses a transform
    transformed = torch._C._are_functorch_transforms_active()
    return "reference" if torch.compiler.is_exporting() or transformed else _chosen


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def xformers_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products are to go to oneDNN: torch would give them to MKL, whose AVX-512 is for Intel's processors.

    A rule, not a measurement: two runs on one machine must not differ in their rounding.
    """
    mkl = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return mkl and torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_vendor() not in ("", "GenuineIntel")


def _cpu_vendor() -> str:
    """As Linux names it; "" where it cannot be known."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def interpreting() -> bool:
    """True where Triton programs run in its Python interpreter on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def device_runs_triton(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= _MINIMUM_CAPABILITY


def triton_runs(tensor: torch.Tensor) -> bool:
    """True if our kernels are to run on this tensor: a GPU of compute capability 8.0 or newer, half precision or fp32.

    With `use_backend("triton")` under TRITON_INTERPRET=1 also on CPU tensors, which is how the kernels are tested.
    """
    if _chosen not in ("auto", "triton", "sdpa", "xformers", "flex") or not triton_installed():
        return False
    if tensor.device.type == "cuda":
        return tensor.dtype != torch.float64 and device_runs_triton(tensor.device.index or 0)
    return _chosen == "triton" and interpreting() and tensor.device.type == "cpu"
