"""The Slurm script, run by stand-ins for srun and scontrol: Slurm itself cannot be had on a test machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "recipes" / "slurm" / "pretrain.sbatch"
SRUN = """#!/usr/bin/env bash
# two tasks, each with what Slurm tells it; signals go to the processes of the step, as --signal does without B:
shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 setsid "$@" & echo $! >> "$STEP_PIDS"
done
code=0
trap : USR1 TERM
for job in $(jobs -p); do
    while wait $job; one=$?; kill -0 $job 2>/dev/null; do :; done
    [ $one -gt $code ] && code=$one
done
exit $code
"""


@pytest.fixture
def batch(tmp_path, environment):
    """`batch(*arguments)` starts the script as Slurm would."""
    (tmp_path / "bin").mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\n[ "$1" = show ] && echo localhost || echo "$@" >> "$REQUEUED"\n',
    }.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*arguments):
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, arguments)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment | {
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": "4321",
                "SLURM_JOB_NODELIST": "localhost", "STEP_PIDS": str(tmp_path / "pids"),
                "REQUEUED": str(tmp_path / "requeued"),
            },
        )  # fmt: skip

    return start


def test_the_script_asks_for_signal_and_requeue():
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=USR1@120" in text
    assert "#SBATCH --requeue" in text
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.slow
def test_a_signalled_job_is_saved_and_requeued(batch, tiny, tmp_path):
    options = (tiny.__file__, "--output-dir", tmp_path / "run", "--device", "cpu", "--steps", 200, "--step-s", 0.05)
    process = batch(*options)
    for line in process.stdout:
        if line.startswith("step "):
            break
    for pid in (tmp_path / "pids").read_text().split():
        os.killpg(int(pid), signal.SIGUSR1)
    rest = process.communicate(timeout=600)[0]
    assert process.returncode == 0, rest
    assert "stopped by a signal: saved step" in rest
    assert (tmp_path / "requeued").read_text() == "requeue 4321\n"
    # the requeued job goes on; when it is complete it is not requeued again
    process = batch(*options[:-2])
    rest = process.communicate(timeout=600)[0]
    assert process.returncode == 0, rest
    assert "continuing" in rest
    assert "complete: step 200" in rest
    assert (tmp_path / "requeued").read_text() == "requeue 4321\n"


@pytest.mark.slow
def test_a_failing_job_is_not_requeued(batch, tiny, tmp_path):
    began = time.monotonic()
    process = batch(tiny.__file__, "--output-dir", tmp_path / "run", "--optim.lrr", 1)
    rest = process.communicate(timeout=600)[0]
    assert process.returncode == 2, rest
    assert not (tmp_path / "requeued").exists()
    assert time.monotonic() - began < 60
