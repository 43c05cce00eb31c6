"""The faults as a record: runs tests/faults as a whole and keeps what each test counted.

    python -m benchmarks.faults            # `make test-faults`; all of it, prints the table
    python -m benchmarks.faults --record   # ... and writes benchmarks/records/<date>_<device>_faults.json

The record is written only where every test passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, environment
from benchmarks.record import record_path
from benchmarks.records import FOLDER

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def newest_faults(folder: Path = FOLDER) -> tuple[Path, dict[str, Any]] | None:
    """The last record of the faults; None where there is none."""
    paths = sorted(folder.glob("*_faults.json"))
    return (paths[-1], json.loads(paths[-1].read_text())) if paths else None


def table(faults: list[dict[str, Any]]) -> list[str]:
    """What was tried and how often it went as it should, as Markdown."""
    lines = ["| test | what is done | passed | target | seen |", "|---|---|---|---|---|"]
    for fault in sorted(faults, key=lambda f: int(f["test"][1:])):
        lines.append(
            f"| {fault['test']} | {fault['what']} | {fault['passed']} of {fault['trials']} | {fault['target']} | "
            f"{fault['note']} |"
        )
    return lines


def section(folder: Path, page: Path) -> str:
    """The table of the newest record for `page`, and its conditions."""
    found = newest_faults(folder)
    if found is None:
        return "No record of the faults exists yet: `make test-faults`."
    path, record = found
    e = record["environment"]
    place = os.path.relpath(path, page.parent)
    return "\n".join(
        [
            *table(record["faults"]),
            "",
            f"{path.name[:10]}, {path.stem.split('_')[1]}, {record['seconds'] / 60:.0f} minutes; `make test-faults`; "
            f"commit `{e['commit']}`; torch {e['versions'].get('torch', '?')}; record [`{path.name}`]({place}).",
        ]
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Run the faults, count, record.")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/records")
    given, options = parser.parse_known_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = record_path("faults", device) if given.record else None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.jsonl"
        command = [sys.executable, "-m", "pytest", "tests/faults", "-m", "slow or not slow", *options]
        environ = os.environ | {"BEIT_FAST_FAULTS_RECORD": str(counts), "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environ).returncode
        faults = [json.loads(line) for line in counts.read_text().splitlines()] if counts.exists() else []
    print("\n".join(table(faults)))
    if path is not None and code == 0:
        record = {"environment": environment(device), "seconds": round(time.monotonic() - began), "faults": faults}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
