"""How long a run takes to list its images before the first step, beside the code of 073a3e4.

    pytest benchmarks/bench_opening.py --benchmark-only

Each opens the same folders in a process of its own that has imported everything; the clock runs from the request to the
answer. The earlier code comes out of the repository's history (`git archive`) and needs no compilation for this.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import OURS, Comparison, Implementation, Unavailable
from benchmarks.machine import ROOT

EARLIER = "073a3e4"
NAMES = [OURS, EARLIER]
WAYS = {
    "with labels": "from beit_fast.data.labelled import open_training as open_; source = lambda d: d.source",
    "without labels": "from beit_fast.data.sources import open_source as open_; source = lambda d: d",
}
SERVER = """
import sys, zlib
{way}
for path in sys.stdin:
    data = source(open_(path.strip()))
    if path.startswith(" "):  # what the results are compared by
        names = [data.name(i) for i in range(len(data))]
        print(len(names), zlib.crc32("\\n".join(names).encode()), flush=True)
    else:
        print(len(data), flush=True)
"""


def cases(scale: Any) -> dict[str, Any]:
    files, classes = scale.pick(tiny=(200, 10), cpu=(20_000, 1000), gpu=(20_000, 1000), full=(100_000, 1000))
    return {f"{files} files {way}": (files, classes, way) for way in WAYS}


@cache
def class_folders(files: int, classes: int) -> tempfile.TemporaryDirectory[str]:
    """A folder of class folders with empty files: opening reads names only."""
    folder = tempfile.TemporaryDirectory()
    for number in range(classes):
        place = Path(folder.name, f"n{number:08d}")
        place.mkdir()
        for image in range(files // classes):
            (place / f"{place.name}_{image}.JPEG").touch()
    return folder


@cache
def earlier_code() -> tempfile.TemporaryDirectory[str]:
    """The packages of `EARLIER`."""
    done = subprocess.run(["git", "archive", EARLIER, "beit_fast", "kernels"], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise Unavailable(f"the repository here has no commit {EARLIER}: git fetch --unshallow")
    folder = tempfile.TemporaryDirectory()
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder.name, filter="data")
    return folder


def opening(root: Path, files: int, classes: int, way: str) -> Implementation:
    """Opens the folders by the code that lies in `root`."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(way=WAYS[way])], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    path = class_folders(files, classes).name

    def ask(request: str) -> list[int]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{request}\n")
        process.stdin.flush()
        return [int(word) for word in process.stdout.readline().split()]

    assert ask(path) == [files]
    return Implementation(lambda: ask(path), lambda: {"names": torch.tensor(ask(f" {path}"), dtype=torch.float64)})


def compare(files: int, classes: int, way: str) -> Comparison:
    roots = {OURS: lambda: ROOT, EARLIER: lambda: Path(earlier_code().name)}
    return Comparison(
        group=f"opening {files:,} files in {classes:,} class folders, {way}",
        implementations={name: lambda root=root: opening(root(), files, classes, way) for name, root in roots.items()},
        shapes={"files": files, "classes": classes},
        tolerance=0.0,
    )


@pytest.mark.parametrize("name", NAMES)
def test_opening(interleaved, case, name):
    interleaved(case, lambda: compare(*case), name, 20.0)
