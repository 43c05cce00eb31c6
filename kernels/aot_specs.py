"""Which configurations of the Triton kernels are compiled ahead of time: every shipped row, and every candidate."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from beit_fast.kernels.launch_table import CANDIDATES, launch_config

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class AotSpec:
    """One configuration of a kernel to compile ahead of time, so that its static costs can be checked without a GPU.

    Args:
        label: unique within a folder; names the row in static_costs.json.
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type ("*bf16", "i32", "fp32", ...), constexprs left out.
        constants: constexpr name -> value (None for a pointer that is not given).
        num_warps, num_stages: as at the launch.
        has_matmul: whether tensor-core instructions must appear in the machine code.
        has_stack: whether what the table records may lie on the stack, and not only what the architecture allows.
        unaligned: arguments not known to be divisible by 16; pointers and integers otherwise are.
        architectures: compute capabilities this configuration is launched on.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    has_matmul: bool = False
    has_stack: bool = False
    unaligned: frozenset[str] = frozenset()
    architectures: tuple[int, ...] = (80, 90)


FLOATS = ("eps", "scale", "shift", "scale_log2", "inverse_scale", "log2e", "slack", "sum_error")


def _spec(
    label: str, kernel: Any, values: Mapping[str, Any], pointers: Mapping[str, str], unaligned: str = ""
) -> AotSpec:
    """A specification whose signature is read off the kernel's arguments.

    Args:
        values: the launch row and all constants; what of it the kernel does not take is the launcher's.
        pointers: argument without `_ptr` -> element type; "" is that of all others.
        unaligned: names, between spaces, of integers that need not be divisible by 16.
    """
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = "*" + (pointers.get(name.removesuffix("_ptr")) or pointers[""])
        elif name not in values:
            signature[name] = "fp32" if name in FLOATS or name.startswith(("scale_", "shift_")) else "i32"
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    odd = frozenset(unaligned.split()) & set(signature)
    warps, stages = values["num_warps"], values["num_stages"]
    architectures = (80, 90) if re.search(r"fp|value|looped|D=1", label) else ARCHITECTURES  # else BEiT-B's in bf16
    return AotSpec(label, kernel, signature, constants, warps, stages, False, False, odd, architectures)


def _row(name: str, bucket: int | None = None, **constants: Any) -> dict[str, Any]:
    """The default launch row of a kernel, and further constants."""
    return {**launch_config(name, "default", bucket), **constants}


def _gelu() -> Iterator[AotSpec]:
    from beit_fast.kernels.gelu.kernel import bias_gelu_backward_kernel, bias_gelu_kernel

    for dtype in ("bf16", "fp32"):
        pointers = {"": dtype, "bias": "fp32", "partial": "fp32"}
        yield _spec(f"gelu_forward {dtype}", bias_gelu_kernel, _row("gelu_forward", HAS_BIAS=True), pointers)
        values = _row("gelu_backward", HAS_BIAS=True, NEED_BIAS=True)
        yield _spec(f"gelu_backward {dtype}", bias_gelu_backward_kernel, values, pointers)

    for name, kernel in (("gelu_forward", bias_gelu_kernel), ("gelu_backward", bias_gelu_backward_kernel)):
        pointers = {"": "bf16", "bias": "fp32", "partial": "fp32"}
        yield from _candidates(name, None, kernel, pointers, "", HAS_BIAS=True, NEED_BIAS=True)


def _candidates(
    name: str, bucket: int | None, kernel: Any, pointers: Mapping[str, str], unaligned: str, **constants: Any
) -> Iterator[AotSpec]:
    """The candidates of a pointwise kernel."""
    rows = CANDIDATES["sm_90"][name if bucket is None else f"{name}/{bucket}"]
    for row in rows:
        sizes = " ".join(f"{key} {value}" for key, value in row.items())
        spec = _spec(f"{name} candidate {sizes}", kernel, {**row, **constants}, pointers, unaligned)
        yield replace(spec, architectures=(90,))


def _color_jitter() -> Iterator[AotSpec]:
    from beit_fast.kernels.color_jitter.kernel import color_jitter_kernel

    for dtype in ("bf16", "fp32"):
        pointers = {"": "fp32", "crops": "u8", "flips": "u8", "out": dtype}
        yield _spec(f"color_jitter {dtype}", color_jitter_kernel, _row("color_jitter"), pointers)


def _position_bias() -> Iterator[AotSpec]:
    from beit_fast.kernels.position_bias.kernel import gather_bias_kernel, scatter_table_grad_kernel

    sizes = "h w H N R"
    yield _spec("gather_bias fp32", gather_bias_kernel, _row("gather_bias"), {"": "fp32"}, sizes)
    for dtype in ("fp32", "bf16"):
        label, values = f"scatter_table_grad {dtype}", _row("scatter_table_grad")
        yield _spec(label, scatter_table_grad_kernel, values, {"": dtype}, sizes)


def _residual_norm() -> Iterator[AotSpec]:
    """The widths of BEiT-B and larger, everything switched on."""
    from beit_fast.kernels.residual_norm import kernel

    names = "HAS_GAMMA HAS_DROP HAS_BRANCH_BIAS NORM HAS_GRAD_TOTAL NEED_BRANCH NEED_GAMMA NEED_NORM NEED_BRANCH_BIAS"
    flags = dict.fromkeys(names.split(), True)
    for stream, D in (("fp32", 768), ("bf16", 768), ("fp32", 1280)):
        pointers = dict.fromkeys(("branch", "normed", "grad_normed", "grad_branch"), "bf16") | {"": "fp32"}
        pointers |= dict.fromkeys(("x", "total", "grad_total", "grad_x"), stream)
        block = 1 << (D - 1).bit_length()
        for name, function in (
            ("residual_norm_forward", kernel.residual_norm_kernel),
            ("residual_norm_backward", kernel.residual_norm_backward_kernel),
        ):
            yield _spec(f"{name} {stream} D={D}", function, _row(name, block, BLOCK=block, **flags), pointers, "N R")
    pointers = dict.fromkeys(("branch", "normed", "grad_normed", "grad_branch"), "bf16") | {"": "fp32"}
    for name, function in (
        ("residual_norm_forward", kernel.residual_norm_kernel),
        ("residual_norm_backward", kernel.residual_norm_backward_kernel),
    ):
        yield from _candidates(name, 1024, function, pointers, "N R", BLOCK=1024, **flags)
    values = _row("residual_norm_finish", **flags)
    yield _spec("residual_norm_finish", kernel.residual_norm_finish_kernel, values, {"": "fp32"})


def _mim_loss() -> Iterator[AotSpec]:
    """The heads of BEiT-B and BEiT-L, V = 8192."""
    from beit_fast.kernels.mim_loss import kernel

    pointers = {"": "fp32", "rows": "i64", "targets": "i64", "normed": "bf16", "grad_normed": "bf16"}
    for D in (768, 1024):
        block = 1 << (D - 1).bit_length()
        for name, function in (
            ("gather_norm_forward", kernel.gather_norm_kernel),
            ("gather_norm_backward", kernel.gather_norm_backward_kernel),
        ):
            yield _spec(f"{name} D={D}", function, _row(name, block, BLOCK=block), pointers, "M")
    pointers = {"logits": "bf16", "targets": "i64", "loss": "fp32", "hit": "i32"}
    for gradient, whole in ((True, True), (False, True), (True, False)):
        values = _row("cross_entropy", GRADIENT=gradient, WHOLE=whole)
        kind = f"{'gradient' if gradient else 'value'} {'whole' if whole else 'looped'} {values['BLOCK']}"
        yield _spec(f"cross_entropy {kind}", kernel.cross_entropy_kernel, values, pointers)


def _attention() -> Iterator[AotSpec]:
    """197 tokens: head dims 32 to 128 in bf16 (96 runs as 80 does); 64 also in fp16, and without a bias."""
    from beit_fast.kernels.attention import backward, bias, forward, one_pass
    from beit_fast.kernels.tiles import block_of

    kernels = {
        "attention_forward": forward.attention_forward_kernel,
        "attention_backward_query": backward.attention_backward_query_kernel,
        "attention_backward_key": backward.attention_backward_key_kernel,
    }
    specs: dict[str, AotSpec] = {}
    cases = [(head_dim, "bf16", True) for head_dim in (32, 64, 80, 128)] + [(64, "bf16", False), (64, "fp16", True)]
    for (head_dim, dtype, with_bias), capability in itertools.product(cases, ARCHITECTURES):
        if (head_dim, dtype, with_bias) != cases[1] and capability not in (80, 90):
            continue
        pointers = {"": dtype, "bias": "fp16" if dtype == "bf16" else "fp32", "lse": "fp32", "delta": "fp32"}
        block = block_of(head_dim)
        for name, kernel in kernels.items():
            values: dict[str, Any] = dict(launch_config(name, f"sm_{capability}", block))
            tile = f"{values['ROWS']}x{values['COLS']} w{values['num_warps']} s{values['num_stages']}"
            label = f"{name} {dtype} K={head_dim}{'' if with_bias else ' without bias'} {tile}"
            values |= {"K": head_dim, "BLOCK_K": block, "FULL": True, "TAIL": bias.tail_of(197, values["COLS"])}
            values |= {"HAS_BIAS": with_bias, "STORE_DS": with_bias, "SAVE_LSE": True}
            others = specs[label].architectures if label in specs else ()  # of the same configuration
            spec = _spec(label, kernel, values, pointers, "N H first_pair")
            specs[label] = replace(spec, has_matmul=True, architectures=(*others, capability))
    yield from specs.values()
    one_pass_rows = [(name, row) for name, rows in CANDIDATES["sm_90"].items() if "one_pass" in name for row in rows]
    for (name, row), dtype in itertools.product(one_pass_rows, ("bf16", "fp16")):
        num_tokens = int(name.split("/")[1]) - 11  # 197 of 208, 261 of 272
        pointers = {"": dtype, "bias": "fp16" if dtype == "bf16" else "fp32", "lse": "fp32", "delta": "fp32"}
        values = {**row, "K": 64, "BLOCK_K": 64, "HAS_BIAS": True, "STORE_DS": True, "SAVE_LSE": True}
        if "QUERIES" in row:
            kernel, tile = one_pass.attention_backward_one_pass_kernel, f"{row['KEYS']}x{row['QUERIES']}"
            values |= {"COUNT": num_tokens // row["QUERIES"], "TAIL": bias.tail_of(num_tokens, row["QUERIES"])}
        else:
            kernel, tile = one_pass.attention_forward_one_pass_kernel, f"{row['ROWS']}x{row['COLS']}"
            values |= zip(("COUNT", "HALF", "TAIL"), bias.one_pass_columns(num_tokens, row["COLS"]), strict=True)
        label = f"{name.split('/')[0]} {dtype} N={num_tokens} {tile} w{row['num_warps']}"
        spec = _spec(label, kernel, values, pointers, "N H first_pair")
        yield replace(spec, has_matmul=True, has_stack="QUERIES" in row, architectures=(90,))
    for dtype, stored in (("bf16", "fp16"), ("fp16", "fp32")):
        for rows in (0, 64):
            end = f"{dtype}{' fragments' if rows else ''}"
            values, pointers = _row("prepare_bias", ROWS_ARE_KEYS=True, ROWS=rows), {"bias": "fp32", "copy": stored}
            yield _spec(f"prepare_bias {end}", bias.prepare_bias_kernel, values, pointers, "N bias_h bias_q bias_k")
            values, pointers = (
                _row("reduce_bias_gradient", ACCUMULATE=True, ROWS=rows),
                {"ds": dtype, "grad_bias": "fp32"},
            )
            yield _spec(
                f"reduce_bias_gradient {end}", bias.reduce_bias_gradient_kernel, values, pointers, "N H samples"
            )


def _conv() -> Iterator[AotSpec]:
    """DALL-E's encoder in fp16 and, for cards whose users prefer it, bf16."""
    from beit_fast.kernels.conv import kernel

    for dtype in ("fp16", "bf16"):
        pointers = {"": dtype, "bias": "fp32", "images": "fp32"}
        yield _spec(f"bias_relu {dtype}", kernel.bias_relu_kernel, _row("bias_relu"), pointers)
        yield _spec(f"pool_bias_relu {dtype}", kernel.pool_bias_relu_kernel, _row("pool_bias_relu"), pointers, "W")
        values = _row("pixel_conv", CHANNELS=3, SIZE=7, TAPS=160)
        yield replace(_spec(f"pixel_conv {dtype}", kernel.pixel_conv_kernel, values, pointers), has_matmul=True)
        pointers = {"": "fp32", "rows": dtype, "ids": "i64"}
        yield _spec(f"exact_argmax {dtype}", kernel.exact_argmax_kernel, _row("exact_argmax", BLOCK_C=2048), pointers)


def _linear_argmax() -> Iterator[AotSpec]:
    """Codes of 32 dimensions (BEiT v2's tokenizer) on every card, and the widest that the kernel takes."""
    from beit_fast.kernels.linear_argmax.kernel import linear_argmax_kernel

    pointers = {"": "fp32", "ids": "i64"}
    for width, label in ((32, "C=32"), (64, "fp32 C=64"), (128, "fp32 C=128")):
        values = _row("linear_argmax", width, BLOCK_C=width)
        yield _spec(f"linear_argmax {label}", linear_argmax_kernel, values, pointers, "P")


SPECS = {
    "attention": _attention,
    "color_jitter": _color_jitter,
    "conv": _conv,
    "gelu": _gelu,
    "linear_argmax": _linear_argmax,
    "mim_loss": _mim_loss,
    "position_bias": _position_bias,
    "residual_norm": _residual_norm,
}
FOLDERS = tuple(SPECS)


def all_specs(folders: Iterable[str] = FOLDERS) -> dict[str, AotSpec]:
    """ "folder/label" -> every configuration of the kernels of these folders that is shipped."""
    specs: dict[str, AotSpec] = {}
    for folder in folders:
        for spec in SPECS[folder]():
            key = f"{folder}/{spec.label}"
            if key in specs:
                raise ValueError(f"two configurations are labelled {key!r}")
            specs[key] = spec
    return specs
