import os
import subprocess
import sys

import pytest


@pytest.fixture
def run_interpreted():
    """Runs tests of a file in a process of its own with TRITON_INTERPRET=1; returns what pytest printed."""

    def run(path, select):
        command = [sys.executable, "-m", "pytest", str(path), "-k", select, "-p", "no:cacheprovider"]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout

    return run
