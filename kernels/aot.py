"""What each Triton kernel costs before it runs: registers, stack, shared memory, tensor-core instructions.

Compiles every configuration of `all_specs()` for sm_80 and sm_90, those of BEiT-B for all architectures; needs no GPU.

    python -m beit_fast.kernels.aot            # compare with static_costs.json
    python -m beit_fast.kernels.aot --write    # replace this Triton version's part of it
    python -m beit_fast.kernels.aot --folder gelu [--write]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from beit_fast.kernels.aot_specs import FOLDERS, AotSpec, all_specs

TABLE = Path(__file__).with_name("static_costs.json")
# bytes one program may use (CUDA C++ Programming Guide, table 27)
SHARED_LIMIT = dict.fromkeys((86, 89, 120), 99 * 1024) | {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
STACK_LIMIT = {80: 32, 86: 32, 89: 32}  # bytes per thread, else 0; whatever is spilled lies on the stack
MATRIX = {90: "hgmma", 100: "utcmma"}  # the matrix instructions of an architecture, else hmma
REGISTER_SLACK = 8


@dataclass(frozen=True)
class Cost:
    """Registers and stack (bytes) per thread, shared memory (bytes) per program, and counts of instructions.

    Args:
        hmma, hgmma, utcmma: matrix instructions: of a warp, of a warp group (sm_90), of tensor memory (sm_100).
        waits: groups of HGMMA, each of which is waited for. As many groups as HGMMA would run one by one.
        narrow: loads and stores of 8 or 16 bits in global memory: a mask that the compiler cannot prove to be the same
            for neighbours turns one of 128 bits into eight of them.
        loop_stores, loop_loads: of the stack, within loops; loads alone are of what does not change there.
    """

    registers: int
    stack: int
    shared: int
    hmma: int
    hgmma: int
    narrow: int
    waits: int = 0
    utcmma: int = 0
    loop_stores: int = 0
    loop_loads: int = 0


def measure(spec: AotSpec, capability: int) -> Cost:
    """Compiles one configuration for one architecture and reads the machine code."""
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
    in_loops = _instructions_in_loops(code)
    # LOCAL is memory beside the stack that only dynamically indexed arrays take; kernels here have none
    return Cost(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=int(compiled.metadata.shared),
        hmma=len(re.findall(r"\bHMMA\.", code)),
        hgmma=len(re.findall(r"\bHGMMA\.", code)),
        narrow=len(re.findall(r"\b(?:LDG|STG)\.E\S*\.[US](?:8|16)\b", code)),
        waits=len(re.findall(r"\bHGMMA\.[^;]*\bgsb0\b", code)),
        utcmma=len(re.findall(r"\bUTC\w*MMA\b", code)),
        loop_stores=sum("STL" in instruction for instruction in in_loops),
        loop_loads=sum("LDL" in instruction for instruction in in_loops),
    )


def _instructions_in_loops(code: str) -> list[str]:
    """The machine code between each jump backwards and where it goes."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    lines = [(int(address, 16), instruction) for address, instruction in found]
    loops = []
    for address, instruction in lines:
        jump = re.search(r"\bBRA (?:\w+, )?0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    return [text for address, text in lines if any(first <= address <= last for first, last in loops)]


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
    limit = STACK_LIMIT.get(capability, 0)
    if spec.has_stack and recorded is not None:
        limit = recorded.stack
        for kind in ("stores", "loads"):
            count, known = (getattr(c, f"loop_{kind}") for c in (cost, recorded))
            if count > known:
                found.append(f"{where}: {count} {kind} of the stack in loops, recorded {known}")
    if cost.stack > limit:
        found.append(f"{where}: {cost.stack} bytes of stack, limit {limit}")
    if cost.shared > SHARED_LIMIT[capability]:
        found.append(f"{where}: {cost.shared} bytes of shared memory, limit {SHARED_LIMIT[capability]}")
    kind = MATRIX.get(capability, "hmma")
    if spec.has_matmul and not getattr(cost, kind):
        found.append(f"{where}: no {kind.upper()} instruction in a matmul kernel")
    if cost.hgmma and cost.waits >= cost.hgmma:
        found.append(f"{where}: {cost.waits} waits for {cost.hgmma} HGMMA: each runs alone")
    if recorded is None:
        found.append(f"{where}: not in {TABLE.name}; python -m beit_fast.kernels.aot --write")
        return found
    if cost.registers > recorded.registers + REGISTER_SLACK:
        found.append(f"{where}: {cost.registers} registers, recorded {recorded.registers}")
    if cost.shared > recorded.shared:
        found.append(f"{where}: {cost.shared} bytes of shared memory, recorded {recorded.shared}")
    if cost.waits > recorded.waits:
        found.append(f"{where}: {cost.waits} waits for HGMMA, recorded {recorded.waits}")
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
                  f"{cost.hmma:4d} HMMA {cost.hgmma:4d} HGMMA {cost.waits:2d} waits {cost.utcmma:3d} UTCMMA "
                  f"{cost.narrow:3d} narrow", flush=True)  # fmt: skip
            wrong += faults(spec, capability, cost, cost if options.write else recorded.get(key))
    if options.write:
        write(costs, folders)
    print("\n".join(wrong) or "all within the table", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
