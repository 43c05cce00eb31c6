"""The faults as a record: runs tests/faults as a whole and keeps what each test counted.

    python -m benchmarks.faults            # `make test-faults`; all of it, prints the table
    python -m benchmarks.faults --record   # ... and writes benchmarks/records/<date>_<device>_faults.json
    python -m benchmarks.faults --counts c.jsonl tests/faults/test_kills.py   # a part; then --counts c.jsonl --no-run
    python -m benchmarks.faults --counts c.jsonl --no-run --record kills      # ... <date>_<device>_kills_faults.json

The record is written only where every test passed; of parts, where all that was counted went as it should.
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

COSTS = ("steps_lost", "seconds_to_the_end", "artefacts_missing")
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def last_counts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows among the lines of parts; of a test that several parts have, those of the last one."""
    rows: dict[str, list[dict[str, Any]]] = {}
    part: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "part" in line:
            rows, part = rows | part, {}
        else:
            part.setdefault(line["test"], []).append(line)
    return [row for each in (rows | part).values() for row in each]


def merged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each thing that was done: trials added up, of each cost the worst."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        row = rows.setdefault((line["test"], line["what"]), {**line, "trials": 0, "passed": 0, "seconds": 0.0})
        for name in ("trials", "passed", "seconds"):
            row[name] += line[name]
        for name in COSTS:
            if name in line:
                row[name] = max(row[name], line[name])
    return list(rows.values())


def table(faults: list[dict[str, Any]]) -> list[str]:
    """What was tried, how often it went as it should, and what it cost, as Markdown."""
    lines = ["| test | what is done | passed | target | seen |", "|---|---|---|---|---|"]
    for fault in sorted(faults, key=lambda f: int(f["test"][1:])):
        cost = ""
        if "steps_lost" in fault:
            lost, seconds, missing = (fault[name] for name in COSTS)
            cost = f"at most {lost} steps lost, {seconds:g} s to the end, {missing} artefacts missing"
        seen = "; ".join(filter(None, [fault["note"], cost]))
        cells = (fault["test"], fault["what"], f"{fault['passed']} of {fault['trials']}", fault["target"], seen)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def section(folder: Path, page: Path) -> str:
    """The table for `page`, of each test what the newest record that has it says; and the records' conditions."""
    newest: dict[str, Path] = {}
    records = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*_faults.json"))}
    if not records:
        return "No record of the faults exists yet: `make test-faults`."
    for path, record in records.items():
        newest |= {fault["test"]: path for fault in record["faults"]}
    rows = [f for path, record in records.items() for f in record["faults"] if newest[f["test"]] == path]
    lines = [*table(rows), ""]
    for path, record in records.items():
        tests = sorted((test for test in newest if newest[test] == path), key=lambda test: int(test[1:]))
        if tests:
            e, place = record["environment"], os.path.relpath(path, page.parent)
            lines.append(
                f"{', '.join(tests)}: {path.name[:10]}, {path.stem.split('_')[1]}, {record['seconds'] / 60:.0f} "
                f"minutes; `make test-faults`; commit `{e['commit']}`; torch {e['versions'].get('torch', '?')}; "
                f"record [`{path.name}`]({place})."
            )
            lines.append("")
    return "\n".join(lines[:-1])


def run_tests(options: list[str], counts: Path) -> int:
    """Run (a part of) the faults; what they count, and the exit code of this part, go to the end of `counts`."""
    everything = [] if any(option.startswith("tests/") for option in options) else ["tests/faults"]
    command = [sys.executable, "-m", "pytest", *everything, *options, "-m", "slow or not slow"]
    environ = os.environ | {"BEIT_FAST_FAULTS_RECORD": str(counts), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=environ).returncode
    with counts.open("a") as file:
        part = {"part": options, "code": code, "seconds": round(time.monotonic() - began)}
        file.write(json.dumps(part) + "\n")
    return code


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Run the faults, count, record.")
    parser.add_argument(
        "--record", nargs="?", const="", help="keep the result in benchmarks/records; NAME is of a part", metavar="NAME"
    )
    parser.add_argument("--counts", type=Path, help="keep the counts of parts here, each run with its tests behind it")
    parser.add_argument("--no-run", action="store_true", help="run nothing: table and record from --counts")
    given, options = parser.parse_known_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        counts = given.counts or Path(folder) / "counts.jsonl"
        if not given.no_run:
            run_tests(options, counts)
        lines = [json.loads(line) for line in counts.read_text().splitlines()]
    parts = [line for line in lines if "part" in line]
    faults = merged(last_counts(lines))
    print("\n".join(table(faults)))
    code = parts[-1]["code"] if not given.no_run else int(any(row["passed"] < row["trials"] for row in faults))
    if given.record is not None and code == 0:
        path = record_path("_".join(filter(None, [given.record, "faults"])), device)
        seconds = sum(part["seconds"] for part in parts)
        record = {"environment": environment(device), "seconds": seconds, "parts": parts, "faults": faults}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
