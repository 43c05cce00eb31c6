"""The tiny task, loaded from its file, so that a subprocess can run the same file as a program."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One thread for each test process, as their subprocesses have: more add up small sums in another order, so that a run
# in this process would not equal the same run in a subprocess bit for bit. Torch reads it when it is first imported.
os.environ["OMP_NUM_THREADS"] = "1"

PROGRAM = Path(__file__).with_name("train") / "tiny_task.py"


@pytest.fixture(scope="session")
def tiny():
    spec = importlib.util.spec_from_file_location("tiny_task", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_task"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def environment():
    """For subprocesses: one thread, no torchrun variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def program(environment):
    """Runs the tiny recipe as a program: `program(folder, "--steps", "5")`, or not waiting for it with `start=True`."""

    def run(folder, *arguments, start=False, **options):
        command = [sys.executable, str(PROGRAM), "--output-dir", str(folder), *map(str, arguments)]
        if start:
            return subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, **options)

    return run


@pytest.fixture(scope="session")
def weights():
    """Every saved tensor (model, optimizer, averages) of the newest checkpoint of a run, as bytes by name."""
    from beit_fast.train.checkpoint.format import list_checkpoints, verify

    def read(folder):
        newest = verify(list_checkpoints(folder / "checkpoints")[-1])
        files = sorted(p.stem for p in newest.path.glob("*.safetensors"))
        tensors = {f"{f}/{k}": t.numpy().tobytes() for f in files for k, t in newest.tensors(f)}
        return newest.step, tensors

    return read
