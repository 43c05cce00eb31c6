"""Runs benchmarks and keeps the result as a record.

    python -m benchmarks.record mim_step benchmarks/bench_mim_step.py -k "whole_step and base-plus-224-1"

SUBJECT, then what pytest takes: files and options; `-k` chooses from all sizes (`--full`). At least 15 rounds, no time
limit; a record is never written over.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from benchmarks.machine import ROOT, commit, device_slug
from benchmarks.records import FOLDER


def record_path(subject: str, device: torch.device, folder: Path = FOLDER) -> Path:
    """`<date>_<device>_<subject>.json`.

    Raises:
        ValueError: there is one already, or the subject does not fit into a file name.
    """
    if not subject.replace("_", "").isalnum():
        raise ValueError(f"subject {subject!r} must be letters, digits and underscores")
    path = folder / f"{date.today().isoformat()}_{device_slug(device)}_{subject}.json"
    if path.exists():
        raise ValueError(f"{path.name} exists, and records are not changed: choose another subject, or wait a day")
    return path


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m benchmarks.record SUBJECT [FILES and options of pytest]", file=sys.stderr)
        return 2
    subject, *given = arguments
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        path = record_path(subject, device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if commit().endswith("+"):
        print("tracked files differ from the commit; the record will say so (`+`)", file=sys.stderr)
    files = [] if any(not word.startswith("-") for word in given) else ["benchmarks/"]
    options = ["--benchmark-only", "--full", "--benchmark-json", str(path.relative_to(ROOT))]
    command = [sys.executable, "-m", "pytest", *files, *given, *options]
    print(shlex.join(command[1:]))
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
