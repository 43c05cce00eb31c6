"""What each Triton kernel costs before it runs: registers, stack, shared memory, tensor-core instructions.

Compiles every configuration of the `aot_specs()` of the kernels for sm_80 and sm_90; needs no GPU.

    python -m beit_fast.kernels.aot            # compare with static_costs.json
    python -m beit_fast.kernels.aot --write    # replace this Triton version's part of it
    python -m beit_fast.kernels.aot --folder gelu [--write]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from beit_fast.kernels.launch_table import AotSpec

TABLE = Path(__file__).with_name("static_costs.json")
FOLDERS = ("attention", "color_jitter", "gelu", "mim_loss", "position_bias", "residual_norm")
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


def all_specs(folders: Iterable[str] = FOLDERS) -> dict[str, AotSpec]:
    """ "folder/label" -> every configuration that the kernel files of these folders ship."""
    specs = {}
    for folder in folders:
        if Path(__file__).with_name(folder).joinpath("kernel.py").is_file():
            for spec in importlib.import_module(f".{folder}.kernel", __package__).aot_specs():
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
