# mypy: allow-untyped-defs
"""Launches the attention kernels, and lists the configurations whose static costs are checked."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from beit_fast.kernels.attention.bias_programs import bias_gradient, reduce_bias_gradient
from beit_fast.kernels.attention.bias_programs import prepare_bias as prepare_bias_program
from beit_fast.kernels.attention.programs import attention_backward_key, attention_backward_query, attention_forward
from beit_fast.kernels.launch_table import AotSpec, Config, launch_config

LOG2E = math.log2(math.e)
MAX_HEAD_DIM = 128
SCRATCH_BYTES = 32 * 2**20  # dS of one chunk of samples: stays in the L2 cache of an H100 or A100
MAX_SCRATCH_BYTES = 60 * 2**20
_ENOUGH_PROGRAMS = 512  # a chunk this large fills the device


def block_of(head_dim: int) -> int:
    """Head dims are padded, by masks, to a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


def tail_of(num_tokens: int, tile: int) -> int:
    """Width of the tile that takes what full tiles leave: 0, or the least power of two from 16 on that holds it."""
    rest = num_tokens % tile  # may be symbolic under torch.compile: comparisons only
    return 0 if rest == 0 else next(width for width in (16, 32, 64, 128) if rest <= width)


def padded_width(num_tokens: int) -> int:
    """W, the row length of a prepared bias: whole tiles of 64 and their tail. No kernel walks in wider tiles."""
    return num_tokens // 64 * 64 + tail_of(num_tokens, 64)


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """Beside bf16 inputs fp16 holds the bias more exactly than they hold themselves; beside fp16 only fp32 does."""
    return torch.float16 if dtype == torch.bfloat16 else torch.float32


def prepare_bias(bias: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """(H, N, N) -> (1 or 2, H, N, W) for inputs of `dtype`; the second, transposed copy serves the backward."""
    num_heads, num_tokens, _ = bias.shape
    width = padded_width(num_tokens)
    padded = bias.new_empty(2 if transposed else 1, num_heads, num_tokens, width, dtype=prepared_dtype(dtype))
    config = dict(launch_config("prepare_bias", bias.device))
    prepare_bias_program[(triton.cdiv(width, config["BLOCK"]), num_heads)](
        bias, padded, num_tokens, width, padded[0].numel(), *bias.stride(), LOG2E, TRANSPOSED=transposed, **config
    )
    return padded


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if the kernels can read it: unit stride in the last dimension, offsets of tokens in int32."""
    readable = tensor.stride(3) == 1 and tensor.stride(1) * tensor.shape[1] < 2**31
    return tensor if readable else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _config(name: str, q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """The launch configuration of a kernel that walks N tokens, and its shape constants."""
    head_dim, num_tokens = q.shape[3], q.shape[1]
    config = dict(launch_config(name, q.device, block_of(head_dim)))
    return config, {"D": head_dim, "BLOCK_D": block_of(head_dim), "TAIL": tail_of(num_tokens, config["COLS"])}


def forward(
    q: Tensor, k: Tensor, v: Tensor, padded: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(B, N, H, K) three times -> the output (B, N, H, K) and, if `save`, log-sum-exp (B, H, N) fp32 in base 2."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, num_tokens, num_heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, num_heads, num_tokens, dtype=torch.float32) if save else None
    config, shape = _config("attention_forward", q)
    attention_forward[(triton.cdiv(num_tokens, config["ROWS"]) * batch * num_heads,)](
        q, k, v, q if padded is None else padded, out, q if lse is None else lse,
        num_tokens, num_heads, padded_width(num_tokens), scale * LOG2E, *_strides(q, k, v),
        HAS_BIAS=padded is not None, SAVE_LSE=save, **shape, **config,
    )  # fmt: skip
    return out, lse


def samples_per_chunk(batch: int, num_heads: int, num_tokens: int, itemsize: int) -> int:
    """Samples whose dS is held at once; 0 where one sample's is too much. Never a property of the device."""
    sample = num_heads * num_tokens * padded_width(num_tokens) * itemsize
    enough = triton.cdiv(_ENOUGH_PROGRAMS, num_heads * triton.cdiv(num_tokens, 64))
    return min(batch, max(SCRATCH_BYTES // sample, min(enough, MAX_SCRATCH_BYTES // sample)))


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padded: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_bias: bool,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The packed gradient (B, N, 3, H, K) of q, k, v, and that of the bias (H, N, N) fp32, without atomics.

    Args:
        chunk: samples whose dS is held at once while the bias gradient is summed; 0 makes dS again tile by tile and
            holds none. None chooses.
    """
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), grad_out.contiguous()
    batch, num_tokens, num_heads, head_dim = q.shape
    width = padded_width(num_tokens)
    grad_qkv = q.new_empty(batch, num_tokens, 3, num_heads, head_dim)
    delta = torch.empty_like(lse)
    if not need_bias:
        chunk = 0
    elif chunk is None:
        chunk = samples_per_chunk(batch, num_heads, num_tokens, q.element_size())
    ds = q.new_empty(chunk, num_heads, num_tokens, width)
    grad_bias = q.new_empty((num_heads, num_tokens, num_tokens), dtype=torch.float32) if need_bias else None
    bias = q if padded is None else padded
    strides = _strides(q, k, v)

    config, shape = _config("attention_backward_query", q)
    reduce_config = dict(launch_config("reduce_bias_gradient", q.device))
    for first in range(0, batch, chunk or batch):
        samples = min(chunk or batch, batch - first)
        attention_backward_query[(triton.cdiv(num_tokens, config["ROWS"]) * samples * num_heads,)](
            grad_out, q, k, v, bias, out, lse, grad_qkv, delta, ds,
            first * num_heads, num_tokens, num_heads, width, scale * LOG2E, scale, *strides,
            HAS_BIAS=padded is not None, STORE_DS=chunk > 0, **shape, **config,
        )  # fmt: skip
        if chunk > 0:
            reduce_bias_gradient[(triton.cdiv(num_tokens * width, reduce_config["BLOCK"]), num_heads)](
                ds, grad_bias, samples, num_tokens, num_heads, width, ACCUMULATE=first > 0, **reduce_config
            )

    config, shape = _config("attention_backward_key", q)
    attention_backward_key[(triton.cdiv(num_tokens, config["ROWS"]) * batch * num_heads,)](
        grad_out, q, k, v, q if padded is None else padded[1], lse, delta, grad_qkv,
        num_tokens, num_heads, width, scale * LOG2E, scale, *strides, HAS_BIAS=padded is not None, **shape, **config,
    )  # fmt: skip

    if grad_bias is not None and chunk == 0:
        config = dict(launch_config("bias_gradient", q.device, block_of(head_dim)))
        tiles = triton.cdiv(num_tokens, config["ROWS"]) * triton.cdiv(num_tokens, config["COLS"])
        bias_gradient[(tiles, num_heads)](
            grad_out, q, k, v, bias, lse, delta, grad_bias,
            batch, num_tokens, num_heads, width, scale * LOG2E, *strides,
            D=head_dim, BLOCK_D=block_of(head_dim), **config,
        )  # fmt: skip
    return grad_qkv, grad_bias


_HEAD_DIMS = (32, 64, 80, 128)  # 96 runs as 80 does, with another mask


def aot_specs() -> list[AotSpec]:
    """Every configuration for 197 tokens: head dims 32 to 128 in bf16; 64 also in fp16, and without a bias."""
    specs: dict[str, AotSpec] = {}
    for head_dim in _HEAD_DIMS:
        for dtype in ("bf16", "fp16") if head_dim == 64 else ("bf16",):
            for with_bias in (True, False) if (head_dim, dtype) == (64, "bf16") else (True,):
                for capability in (80, 90):
                    for spec in _matmul_specs(head_dim, dtype, with_bias, capability):
                        both = spec.label in specs  # the same configuration on both architectures
                        specs[spec.label] = replace(spec, architectures=(80, 90)) if both else spec
    return [*specs.values(), *_bias_specs()]


def _matmul_specs(head_dim: int, dtype: str, with_bias: bool, capability: int) -> Iterator[AotSpec]:
    stored = "*fp16" if dtype == "bf16" else "*fp32"
    kernels = {
        "attention_forward": (attention_forward, {"SAVE_LSE": True}),
        "attention_backward_query": (attention_backward_query, {"STORE_DS": with_bias}),
        "attention_backward_key": (attention_backward_key, {}),
    }
    if with_bias:
        kernels["bias_gradient"] = (bias_gradient, {})
    for name, (kernel, flags) in kernels.items():
        config = launch_config(name, f"sm_{capability}", block_of(head_dim))
        constants = flags | {"HAS_BIAS": with_bias, "D": head_dim, "BLOCK_D": block_of(head_dim)}
        constants |= {"TAIL": tail_of(197, config["COLS"])}
        signature = {}
        for argument in kernel.arg_names:
            if argument.endswith("_ptr"):
                fp32 = argument in ("lse_ptr", "delta_ptr", "grad_bias_ptr")
                signature[argument] = "*fp32" if fp32 else stored if argument == "bias_ptr" else f"*{dtype}"
            elif argument.startswith("scale"):
                signature[argument] = "fp32"
            elif argument not in constants and argument not in config:
                signature[argument] = "i32"
        label = f"{name} {dtype} K={head_dim}{'' if with_bias else ' without bias'}"
        yield _spec(label, kernel, signature, constants, config, True, (capability,))


def _bias_specs() -> Iterator[AotSpec]:
    for dtype, stored in (("bf16", "*fp16"), ("fp16", "*fp32")):
        signature = {"bias_ptr": "*fp32", "padded_ptr": stored, "log2e": "fp32"}
        signature |= dict.fromkeys(("N", "W", "plane", "bias_h", "bias_q", "bias_k"), "i32")
        config = launch_config("prepare_bias", "default")
        yield _spec(f"prepare_bias {dtype}", prepare_bias_program, signature, {"TRANSPOSED": True}, config)
        signature = {"ds_ptr": f"*{dtype}", "grad_bias_ptr": "*fp32"} | dict.fromkeys(("samples", "N", "H", "W"), "i32")
        config = launch_config("reduce_bias_gradient", "default")
        yield _spec(f"reduce_bias_gradient {dtype}", reduce_bias_gradient, signature, {"ACCUMULATE": True}, config)


def _spec(
    label: str,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    config: Config,
    has_matmul: bool = False,
    architectures: tuple[int, ...] = (80, 90),
) -> AotSpec:
    values = {name: value for name, value in (constants | dict(config)).items() if name in kernel.arg_names}
    tile = f" {config['ROWS']}x{config['COLS']} w{config['num_warps']} s{config['num_stages']}" if has_matmul else ""
    odd = frozenset({"N", "H", "B", "samples", "first_pair", "bias_h", "bias_q", "bias_k"} & set(signature))
    return AotSpec(
        label + tile, kernel, signature, values, config["num_warps"], config["num_stages"], has_matmul, odd,
        architectures,
    )  # fmt: skip
