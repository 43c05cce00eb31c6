"""Runs the interpreted cases of every kernel test in one process with TRITON_INTERPRET=1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast.kernels.backend import interpreting, triton_installed


@pytest.mark.skipif(interpreting(), reason="already in the interpreter's process")
@pytest.mark.skipif(not triton_installed(), reason="needs triton")
@pytest.mark.parametrize("select", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(select: str) -> None:
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(here),
        "-k",
        "interpreted",
        "-m",
        select,
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
