"""How long `import beit_fast` takes in a fresh interpreter, beside timm's and transformers' BEiT and torch alone.

    pytest benchmarks/bench_import_time.py --benchmark-only

The clock is the interpreter's own, from its start to the end of the import, so that of torch is part of all of them.
"""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.harness import OURS, Comparison, Implementation, Unavailable
from benchmarks.machine import ROOT

STUBS = "from benchmarks.baselines.torchvision_stubs import make_torchvision_importable as m; m(); "
STATEMENTS = {
    OURS: ("beit_fast", "import beit_fast"),
    "timm.models.beit": ("timm", STUBS + "import timm.models.beit"),
    "transformers' BeitModel": ("transformers", STUBS + "from transformers import BeitModel"),
    "torch alone": ("torch", "import torch"),
}


def cases(scale: Any) -> dict[str, str]:
    return {"import": "import"}


def importing(name: str) -> Implementation:
    package, statement = STATEMENTS[name]
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    return Implementation(
        lambda: subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True, capture_output=True)
    )


def compare() -> Comparison:
    return Comparison(
        group="import in a fresh interpreter",
        implementations={name: lambda name=name: importing(name) for name in STATEMENTS},  # type: ignore[misc]
        shapes={},
    )


@pytest.mark.parametrize("name", STATEMENTS)
def test_import(interleaved, case, name):
    interleaved(case, compare, name, 20.0)
