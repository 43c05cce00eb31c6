"""Launch configurations of the Triton kernels: a shipped table per architecture, never a search in the first step.

A kernel asks for its row with `launch_config("gelu_backward", device, bucket)`. The user's own table, which
`python -m beit_fast tune` writes, comes first, then the shipped row of the architecture, then the safe default of the
kernel. The static costs of every shipped row are checked for each architecture in tests/kernels/test_aot.py.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Config = Mapping[str, int]  # block sizes by the kernel's own names, num_warps, num_stages

# as much shared memory as 99 KB a program; 64 x 64 has 32 to 80 bytes of stack there
_SMALL: dict[str, Config] = {"attention_backward_key": {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 2}}

# architecture -> "kernel" or "kernel/bucket" -> configuration. A kernel must have a row under "default".
SHIPPED: dict[str, dict[str, Config]] = {
    "default": {
        # by the power of two that holds a head dim; COLS at most 64
        "attention_forward": {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2},
        "attention_forward/128": {"ROWS": 128, "COLS": 32, "num_warps": 8, "num_stages": 2},
        "attention_backward_query": {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 2},
        "attention_backward_query/128": {"ROWS": 128, "COLS": 32, "num_warps": 8, "num_stages": 2},
        "attention_backward_key": {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2},
        "attention_backward_key/128": {"ROWS": 32, "COLS": 32, "num_warps": 8, "num_stages": 2},
        "prepare_bias": {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
        "reduce_bias_gradient": {"BLOCK": 1024, "num_warps": 4, "num_stages": 2},
        "gather_bias": {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
        "scatter_table_grad": {"ROWS": 32, "QUERIES": 64, "num_warps": 4, "num_stages": 1},
        "gelu_forward": {"ROWS": 4, "COLS": 512, "num_warps": 4, "num_stages": 1},
        "gelu_backward": {"ROWS": 4, "COLS": 256, "PROGRAMS": 256, "num_warps": 4, "num_stages": 1},
        # by the power of two that holds a row: its elements stay in registers
        "residual_norm_forward": {"num_warps": 4, "num_stages": 1},
        "residual_norm_forward/2048": {"num_warps": 8, "num_stages": 1},
        "residual_norm_forward/4096": {"num_warps": 16, "num_stages": 1},
        "residual_norm_backward": {"PROGRAMS": 512, "num_warps": 8, "num_stages": 1},
        "residual_norm_backward/4096": {"PROGRAMS": 512, "num_warps": 16, "num_stages": 1},
        "residual_norm_finish": {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 1},
        "cross_entropy": {"BLOCK": 8192, "num_warps": 16, "num_stages": 1},
        "gather_norm_forward": {"num_warps": 4, "num_stages": 1},
        "gather_norm_backward": {"PROGRAMS": 256, "num_warps": 8, "num_stages": 1},
        "color_jitter": {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
        "bias_relu": {"ROWS": 8, "COLS": 256, "num_warps": 4, "num_stages": 1},
        "pool_bias_relu": {"ROWS": 4, "COLS": 256, "num_warps": 4, "num_stages": 1},
        "pixel_conv": {"ROWS": 64, "COLS": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
        "exact_argmax": {"BLOCK": 8192, "num_warps": 8, "num_stages": 1},
        "linear_argmax": {"ROWS": 64, "COLS": 64, "num_warps": 8, "num_stages": 1},  # by the power of two that holds C
        "linear_argmax/128": {"ROWS": 32, "COLS": 32, "num_warps": 4, "num_stages": 1},
    },
    "sm_80": {},
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90": {
        # measured on an H100 at B = 256, N = 197, H = 12: 215 us against 220 of 64 x 64, and 726 and 663 us against 764
        # and 760 for the whole backward pass without a bias gradient
        "attention_forward/64": {"ROWS": 128, "COLS": 32, "num_warps": 4, "num_stages": 3},
        "attention_backward_query/64": {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 3},
        "attention_backward_key/64": {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 3},
        "attention_forward/128": {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2},
        "attention_backward_query": {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2},
        "attention_backward_query/128": {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2},
        "attention_backward_key/128": {"ROWS": 64, "COLS": 32, "num_warps": 8, "num_stages": 2},
    },
    "sm_100": {},
    "sm_120": _SMALL,
    # few and fat programs, each with several turns of its loop: the interpreter's time goes by operations, not elements
    "interpreter": {
        "attention_forward": {"ROWS": 128, "COLS": 64, "num_warps": 4, "num_stages": 1},
        "attention_backward_query": {"ROWS": 128, "COLS": 64, "num_warps": 4, "num_stages": 1},
        "attention_backward_key": {"ROWS": 128, "COLS": 64, "num_warps": 4, "num_stages": 1},
        "prepare_bias": {"BLOCK": 16384, "num_warps": 4, "num_stages": 1},
        "reduce_bias_gradient": {"BLOCK": 16384, "num_warps": 4, "num_stages": 1},
        "gather_bias": {"BLOCK": 16384, "num_warps": 4, "num_stages": 1},
        "scatter_table_grad": {"ROWS": 512, "QUERIES": 64, "num_warps": 4, "num_stages": 1},
        "gelu_forward": {"ROWS": 8, "COLS": 64, "num_warps": 4, "num_stages": 1},
        "gelu_backward": {"ROWS": 4, "COLS": 64, "PROGRAMS": 2, "num_warps": 4, "num_stages": 1},
        "residual_norm_backward": {"PROGRAMS": 3, "num_warps": 4, "num_stages": 1},
        "residual_norm_finish": {"ROWS": 2, "COLS": 512, "num_warps": 4, "num_stages": 1},
        "gather_norm_backward": {"PROGRAMS": 3, "num_warps": 4, "num_stages": 1},
        "bias_relu": {"ROWS": 64, "COLS": 16, "num_warps": 4, "num_stages": 1},
        "pool_bias_relu": {"ROWS": 64, "COLS": 16, "num_warps": 4, "num_stages": 1},
        "pixel_conv": {"ROWS": 128, "COLS": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        "exact_argmax": {"BLOCK": 512, "num_warps": 4, "num_stages": 1},
        "linear_argmax": {"ROWS": 64, "COLS": 128, "num_warps": 4, "num_stages": 1},
    },
}


# Compiled, checked and tested like shipped rows, but not yet timed on a GPU: `tune` times them against what is shipped.
CANDIDATES: dict[str, dict[str, tuple[Config, ...]]] = {
    "sm_90": {
        # wider tiles, other numbers of warps, and whole waves of 132 multiprocessors (PROGRAMS)
        "gelu_forward": (
            {"ROWS": 2, "COLS": 1024, "num_warps": 8, "num_stages": 1},
            {"ROWS": 1, "COLS": 1024, "num_warps": 4, "num_stages": 1},
        ),
        "gelu_backward": (
            {"ROWS": 4, "COLS": 256, "PROGRAMS": 264, "num_warps": 4, "num_stages": 1},
            {"ROWS": 4, "COLS": 512, "PROGRAMS": 264, "num_warps": 8, "num_stages": 1},
        ),
        "residual_norm_forward/1024": ({"num_warps": 2, "num_stages": 1}, {"num_warps": 8, "num_stages": 1}),
        "residual_norm_backward/1024": (
            {"PROGRAMS": 528, "num_warps": 8, "num_stages": 1},
            {"PROGRAMS": 1056, "num_warps": 4, "num_stages": 1},
        ),
        "attention_forward_one_pass/208": ({"ROWS": 64, "COLS": 128, "num_warps": 4, "num_stages": 2},),
        "attention_backward_one_pass/208": (
            {"KEYS": 64, "QUERIES": 32, "num_warps": 4, "num_stages": 1},
            {"KEYS": 128, "QUERIES": 64, "num_warps": 8, "num_stages": 1},
        ),
        "attention_backward_one_pass/272": ({"KEYS": 128, "QUERIES": 32, "num_warps": 8, "num_stages": 1},),
    },
}


def launch_config(kernel: str, architecture: str | torch.device, bucket: int | str | None = None) -> Config:
    """The configuration of `kernel` for one architecture ("sm_90") or for the GPU a device names.

    Args:
        bucket: a class of shapes, in the kernel's own terms; rows without one serve every bucket.

    Raises:
        ValueError: the kernel has no row, not even a default one.
    """
    bucket = None if bucket is None else str(bucket)
    if (kernel, bucket) in _trials:
        return _trials[kernel, bucket]
    if isinstance(architecture, torch.device):
        architecture = architecture_of(architecture)
    return _resolve(kernel, architecture, bucket)


def find_config(kernel: str, device: torch.device, bucket: int) -> Config | None:
    """The configuration of a kernel with an alternative, where a table has a row for just this bucket; else None."""
    found = _trials.get((kernel, str(bucket)))
    if found is None:
        architecture, name = architecture_of(device), f"{kernel}/{bucket}"
        found = _user_table().get(architecture, {}).get(name) or SHIPPED.get(architecture, {}).get(name)
    return found


def launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, /, *others: Any, **constants: Any) -> None:
    """Runs a Triton kernel on the GPU that its first argument is on, whichever is the current one."""
    if _recorded is not None:
        _recorded.append((kernel, grid, (first, *others), constants))
    elif not first.is_cuda or first.device.index == torch.cuda.current_device():
        kernel[grid](first, *others, **constants)
    else:
        with torch.cuda.device(first.device):
            kernel[grid](first, *others, **constants)


_recorded: list[tuple[Any, ...]] | None = None


@contextmanager
def recording() -> Iterator[list[tuple[Any, ...]]]:
    """Lists the launches within, as (kernel, grid, arguments, constants), in place of running them."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


_trials: dict[tuple[str, str | None], Config] = {}


@contextmanager
def trial(kernel: str, bucket: str | None, config: Config) -> Iterator[None]:
    """Launches one kernel (of one bucket) with another configuration for a while."""
    _trials[kernel, bucket] = config
    try:
        yield
    finally:
        del _trials[kernel, bucket]


@functools.cache
def _resolve(kernel: str, architecture: str, bucket: str | None) -> Config:
    names = [kernel] if bucket is None else [f"{kernel}/{bucket}", kernel]
    for table in (_user_table().get(architecture, {}), SHIPPED.get(architecture, {}), SHIPPED["default"]):
        for name in names:
            if name in table:
                return table[name]
    raise ValueError(f"kernel {kernel!r} has no row in the launch table; give it one under SHIPPED['default']")


def architecture_of(device: torch.device) -> str:
    """ "sm_90" for an H100; "interpreter" for CPU tensors, which is the only way kernels run on them."""
    return _architecture(device.index or 0) if device.type == "cuda" else "interpreter"


@functools.cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    name = f"sm_{major}{minor}"
    if name not in SHIPPED and name not in _user_table():
        warnings.warn(
            f"{torch.cuda.get_device_name(index)}: no launch rows for {name}, the safe ones are used; "
            "`python -m beit_fast tune` finds faster ones",
            stacklevel=2,
        )
    return name


def user_table_path() -> Path:
    """Where `python -m beit_fast tune` keeps what it found: $BEIT_FAST_LAUNCH, else the user's cache folder."""
    given = os.environ.get("BEIT_FAST_LAUNCH")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(given) if given else cache / "beit_fast" / "launch.json"


@functools.cache
def _user_table() -> dict[str, dict[str, Config]]:
    path = user_table_path()
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        if all(isinstance(row, dict) for rows in table.values() for row in rows.values()):
            return table
    except (OSError, ValueError, AttributeError):
        pass
    raise ValueError(f"launch table {path} is damaged: delete it, or write it again with `python -m beit_fast tune`")


def forget() -> None:
    """Reads the user's table anew at the next launch, for after it was written."""
    _resolve.cache_clear()
    _user_table.cache_clear()
