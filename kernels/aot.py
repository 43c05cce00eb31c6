"""What each Triton kernel costs before it runs: registers, stack, shared memory, tensor-core instructions.

Compiles every configuration of `all_specs()` for sm_80 and sm_90; needs no GPU.

    python -m beit_fast.kernels.aot            # compare with static_costs.json
    python -m beit_fast.kernels.aot --write    # replace this Triton version's part of it
    python -m beit_fast.kernels.aot --folder gelu [--write]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from beit_fast.kernels.launch_table import launch_config

TABLE = Path(__file__).with_name("static_costs.json")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one program may use (CUDA C++ Programming Guide, table 27)
STACK_LIMIT = {80: 32, 90: 0}  # bytes per thread; whatever is spilled lies on the stack
REGISTER_SLACK = 8


@dataclass(frozen=True)
class Cost:
    """registers and stack (bytes) per thread, shared memory (bytes) per program, HMMA / HGMMA instructions.

    `narrow` counts loads and stores of 8 or 16 bits in global memory: a mask that the compiler cannot prove to be the
    same for neighbours turns one of 128 bits into eight of them.
    """

    registers: int
    stack: int
    shared: int
    hmma: int
    hgmma: int
    narrow: int


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
    unaligned: frozenset[str] = frozenset()
    architectures: tuple[int, ...] = field(default=(80, 90))


FLOATS = ("eps", "scale", "shift", "scale_log2", "log2e", "slack", "sum_error")


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
            signature[name] = "*" + pointers.get(name.removesuffix("_ptr"), pointers.get("", ""))
        elif name not in values:
            signature[name] = "fp32" if name in FLOATS or name.startswith(("scale_", "shift_")) else "i32"
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    odd = frozenset(unaligned.split()) & set(signature)
    return AotSpec(label, kernel, signature, constants, values["num_warps"], values["num_stages"], unaligned=odd)


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
    from beit_fast.kernels.attention import backward, bias, forward

    kernels = {
        "attention_forward": forward.attention_forward_kernel,
        "attention_backward_query": backward.attention_backward_query_kernel,
        "attention_backward_key": backward.attention_backward_key_kernel,
    }
    specs: dict[str, AotSpec] = {}
    cases = [(head_dim, "bf16", True) for head_dim in (32, 64, 80, 128)] + [(64, "bf16", False), (64, "fp16", True)]
    for (head_dim, dtype, with_bias), capability in itertools.product(cases, (80, 90)):
        pointers = {"": dtype, "bias": "fp16" if dtype == "bf16" else "fp32", "lse": "fp32", "delta": "fp32"}
        block = forward.block_of(head_dim)
        for name, kernel in kernels.items():
            values: dict[str, Any] = dict(launch_config(name, f"sm_{capability}", block))
            tile = f"{values['ROWS']}x{values['COLS']} w{values['num_warps']} s{values['num_stages']}"
            label = f"{name} {dtype} K={head_dim}{'' if with_bias else ' without bias'} {tile}"
            values |= {"K": head_dim, "BLOCK_K": block, "TAIL": bias.tail_of(197, values["COLS"])}
            values |= {"HAS_BIAS": with_bias, "STORE_DS": with_bias, "SAVE_LSE": True}
            both = label in specs  # the same configuration on both architectures
            spec = _spec(label, kernel, values, pointers, "N H first_pair")
            specs[label] = replace(spec, has_matmul=True, architectures=(80, 90) if both else (capability,))
    yield from specs.values()
    for dtype, stored in (("bf16", "fp16"), ("fp16", "fp32")):
        values, pointers = _row("prepare_bias", TRANSPOSED=True), {"bias": "fp32", "padded": stored}
        yield _spec(f"prepare_bias {dtype}", bias.prepare_bias_kernel, values, pointers, "N bias_h bias_q bias_k")
        values, pointers = _row("reduce_bias_gradient", ACCUMULATE=True), {"ds": dtype, "grad_bias": "fp32"}
        label, kernel = f"reduce_bias_gradient {dtype}", bias.reduce_bias_gradient_kernel
        yield _spec(label, kernel, values, pointers, "N H samples")


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


SPECS = {
    "attention": _attention,
    "color_jitter": _color_jitter,
    "conv": _conv,
    "gelu": _gelu,
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


def measure(spec: AotSpec, capability: int) -> Cost:
    """Compiles one configuration for one architecture (80, 90) and reads the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    unknown = set(spec.signature) ^ {name for name in names if name not in spec.constants}
    if unknown:
        raise ValueError(f"{spec.label}: signature and constants do not fit the kernel's arguments: {sorted(unknown)}")
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in spec.signature and name not in spec.unaligned and spec.signature[name][0] in "*i"
    }
    source = ASTSource(spec.kernel, signature, dict(spec.constants), aligned)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {spec.label}: {usage.strip()}")
    # LOCAL is memory beside the stack that only dynamically indexed arrays take; kernels here have none
    return Cost(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=int(compiled.metadata.shared),
        hmma=len(re.findall(r"\bHMMA\.", code)),
        hgmma=len(re.findall(r"\bHGMMA\.", code)),
        narrow=len(re.findall(r"\b(?:LDG|STG)\.E\S*\.[US](?:8|16)\b", code)),
    )


def _cuobjdump(flag: str, path: str) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump is neither in the triton package nor on PATH: install the CUDA toolkit")
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout


def faults(spec: AotSpec, capability: int, cost: Cost, recorded: Cost | None) -> list[str]:
    """What is wrong with a cost: against the limits of the architecture, and against the checked-in table."""
    where = f"{spec.label} sm_{capability}"
    found = []
    if cost.stack > STACK_LIMIT[capability]:
        found.append(f"{where}: {cost.stack} bytes of stack, limit {STACK_LIMIT[capability]}")
    if cost.shared > SHARED_LIMIT[capability]:
        found.append(f"{where}: {cost.shared} bytes of shared memory, limit {SHARED_LIMIT[capability]}")
    if spec.has_matmul and not (cost.hgmma if capability == 90 else cost.hmma):
        found.append(f"{where}: no {'HGMMA' if capability == 90 else 'HMMA'} instruction in a matmul kernel")
    if recorded is None:
        found.append(f"{where}: not in {TABLE.name}; python -m beit_fast.kernels.aot --write")
        return found
    if cost.registers > recorded.registers + REGISTER_SLACK:
        found.append(f"{where}: {cost.registers} registers, recorded {recorded.registers}")
    if cost.shared > recorded.shared:
        found.append(f"{where}: {cost.shared} bytes of shared memory, recorded {recorded.shared}")
    if cost.narrow > recorded.narrow:
        found.append(f"{where}: {cost.narrow} loads or stores of 8 or 16 bits, recorded {recorded.narrow}")
    return found


def recorded_costs() -> dict[str, dict[str, Cost]]:
    """Triton version -> "folder/label sm_90" -> cost, from the checked-in table."""
    if not TABLE.is_file():
        return {}
    versions = json.loads(TABLE.read_text())
    return {version: {key: Cost(**row) for key, row in rows.items()} for version, rows in versions.items()}


def write(costs: dict[str, Cost], folders: Iterable[str] = FOLDERS) -> None:
    """Replaces the rows of these folders for the running Triton version."""
    import triton

    versions = {v: {k: asdict(c) for k, c in rows.items()} for v, rows in recorded_costs().items()}
    rows = {key: row for key, row in versions.get(triton.__version__, {}).items() if key.split("/")[0] not in folders}
    rows |= {key: asdict(cost) for key, cost in costs.items()}
    versions[triton.__version__] = dict(sorted(rows.items()))
    lines = []
    for version, table in sorted(versions.items()):
        body = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in table.items())
        lines.append(f'  "{version}": {{\n{body}\n  }}')
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: Iterable[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m beit_fast.kernels.aot", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace this Triton version's rows of the table")
    parser.add_argument("--folder", choices=FOLDERS, help="only the kernels of this folder")
    options = parser.parse_args(None if arguments is None else list(arguments))
    recorded = recorded_costs().get(triton.__version__, {})
    costs, wrong = {}, []
    folders = (options.folder,) if options.folder else FOLDERS
    for name, spec in all_specs(folders).items():
        for capability in spec.architectures:
            key = f"{name} sm_{capability}"
            cost = costs[key] = measure(spec, capability)
            print(f"{key:64s} {cost.registers:4d} regs {cost.stack:5d} B stack {cost.shared / 1024:6.1f} KB "
                  f"{cost.hmma:4d} HMMA {cost.hgmma:4d} HGMMA {cost.narrow:3d} narrow", flush=True)  # fmt: skip
            wrong += faults(spec, capability, cost, cost if options.write else recorded.get(key))
    if options.write:
        write(costs, folders)
    print("\n".join(wrong) or "all within the table", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
