"""Which implementation runs: the one place that probes Triton, xformers, the compiled module and the device.

`auto` (the default) lets every op take its fastest implementation for the tensor's device. The other names force one:
`reference` the plain formulas everywhere, `triton` our kernels, `sdpa`, `xformers` and `flex` another attention
(ops that have no such implementation keep their own).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "reference", "triton", "sdpa", "xformers", "flex")
MAX_HEAD_DIM = 128  # of our attention kernels
_MINIMUM_CAPABILITY = (8, 0)  # older tensor cores: Triton emits no matrix instructions for them

_FEW_ELEMENTS = 1 << 15  # up to here a compiled kernel saves nothing; small runs of earlier versions go on bit by bit

_PROXY = torch._C._TorchDispatchModeKey.PROXY

_chosen = "auto"


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator that does what `torch.compiler.assume_constant_result` does, without importing all of Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
        if name == "xformers" and (reason := xformers_obstacle()):
            raise ValueError(f"backend 'xformers' {reason}")
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def select(op: str, tensor: torch.Tensor, dtype: torch.dtype | None = None, head_dim: int = 0) -> str:
    """The implementation of `op` that runs on this tensor; every call asks once, and its gradient runs the same.

    Args:
        op: the public function's name; "attention" where it has no bias and "biased_attention" where it has one.
        dtype: what the op computes in, where that is not the tensor's own.
        head_dim: K of attention.

    Returns:
        "reference" (the definition, differentiated by torch), "triton" (our kernels), "cpu" (the op's `cpu.py`),
        "torch" (that too, on another device without Triton); of attention also "sdpa", "xformers" and "flex".
    """
    # An export or a trace (torch.jit.trace, the legacy ONNX exporter, make_fx) must run without us; torch.func.grad,
    # vmap and the like can follow the plain formulas only: autograd.Function.apply asks this before it refuses them.
    if (
        torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or (not torch.compiler.is_compiling() and torch._C._get_dispatch_mode(_PROXY) is not None)
    ):
        return "reference"
    attention = op in ("attention", "biased_attention")
    if _chosen == "reference" or (_chosen == "sdpa" and attention):
        return _chosen
    device, dtype = tensor.device, dtype or tensor.dtype
    if device.type == "cpu":
        return "triton" if _chosen == "triton" and interpreting() else "cpu"
    if attention:
        if device.type == "cuda" and _chosen in ("xformers", "flex"):
            return _chosen
        fits = dtype in (torch.float16, torch.bfloat16) and head_dim <= MAX_HEAD_DIM
        if op == "attention" and _chosen == "auto":
            fits = False  # without a bias the flash kernels of SDPA are the fastest
    else:
        fits = dtype != torch.float64
    if device.type == "cuda" and fits and not obstacle(device.index or 0):
        return "triton"
    return "sdpa" if attention else "torch"


@functools.cache
def compiled_module() -> Any:
    """`beit_fast._C`, whose CPU kernels run where `compiled_serves`; None where it is missing, old or slow."""
    try:
        from beit_fast import _C
    except ImportError:  # installed without it: BEIT_FAST_BUILD=0
        return None
    return _C if getattr(_C, "HAS_VECTORS", False) else None


def compiled_serves(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the CPU kernels of `csrc/` may take these tensors: contiguous, fp32, and the first one not too small."""
    module = compiled_module()
    if module is None or first.numel() <= _FEW_ELEMENTS or not (module.HAS_THREADS or torch.get_num_threads() == 1):
        return False
    for tensor in (first, *others):
        if tensor is None:
            continue
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
    return True


@constant_in_graphs
def obstacle(index: int) -> str:
    """Why our kernels cannot run on this GPU, in half a line; "" if they can."""
    if not triton_installed():
        return "Triton is not installed"
    if not device_runs_triton(index):
        return "below compute capability 8.0 Triton emits no tensor-core instructions"
    return ""


def interpreting() -> bool:
    """Whether Triton kernels run in its Python interpreter on CPU tensors (TRITON_INTERPRET=1), as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def device_runs_triton(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    if capability < _MINIMUM_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(index), capability
        warnings.warn(
            f"{name}: compute capability {major}.{minor} is below 8.0, torch's operators are used", stacklevel=2
        )
    return capability >= _MINIMUM_CAPABILITY


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def xformers_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None


@functools.cache
def xformers_obstacle() -> str:
    """Why xformers cannot run here, in one line; "" if it can. A wheel for another torch imports and fails in use."""
    if not xformers_installed():
        return "needs the xformers package: pip install beit-fast[xformers]"
    try:
        from xformers.ops import memory_efficient_attention

        if torch.cuda.is_available():
            tiny = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda")
            memory_efficient_attention(tiny, tiny, tiny)
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        return f"cannot run here, install the xformers built for torch {torch.__version__}: {said.splitlines()[0]}"
    return ""


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
