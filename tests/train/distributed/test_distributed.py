"""Two processes over gloo: the same numbers as one, one stop for all, any world size on resume."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from beit_fast.train import engine
from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.distributed.world import resolve_device
from beit_fast.train.metrics import read_metrics

TWO_RANKS = """
import dataclasses, importlib.util, json, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("tiny_task", sys.argv[1])
tiny = importlib.util.module_from_spec(spec); sys.modules["tiny_task"] = tiny; spec.loader.exec_module(tiny)
import torch
from beit_fast.train import engine

def child(rank, port, folder, changes, only_rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 0:
        changes = changes | only_rank
    config = dataclasses.replace(tiny.RECIPE, output_dir=Path(folder), **changes)
    os._exit(engine.run(tiny.TinyTask(config)).exit_code)

for port, folder, changes, only_rank, expected in json.loads(sys.argv[2]):
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                child(rank, port, folder, changes, only_rank)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [expected] * 2, codes
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def close(a, b):
    for name in a:
        x, y = (torch.frombuffer(bytearray(v), dtype=torch.float32) for v in (a[name], b[name]))
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_equal_one(tiny, tmp_path, weights, environment):
    """Ragged targets, accumulation of unequal micro-batches, gradient clipping; then a stop asked of one rank only."""
    one = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "one")
    engine.run(tiny.TinyTask(one))
    jobs = [
        (free_port(), str(tmp_path / "two"), {"batch_per_device": 3}, {}, 0),
        (free_port(), str(tmp_path / "stopped"), {}, {"signal_at": 5}, 75),
    ]
    command = [sys.executable, "-c", TWO_RANKS, tiny.__file__, json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (_, expected), (step, found) = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert step == 12
    close(expected, found)
    for a, b in zip(*(read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "two")), strict=True):
        for key in ("loss", "accuracy", "grad_norm", "held_out_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4)

    # the rank that got the signal at step 5 and the other one stopped together, and one process goes on from there
    stopped = tmp_path / "stopped"
    assert [p.name for p in list_checkpoints(stopped / "checkpoints")][-1] == "step_00000007"
    assert done.stdout.count("stopped by a signal: saved step 7") == 1
    alone = dataclasses.replace(tiny.RECIPE, output_dir=stopped)
    assert engine.run(tiny.TinyTask(alone)).step == 12
    close(expected, weights(stopped)[1])


@pytest.mark.slow
def test_torchrun_with_a_signal_and_orphans(tiny, tmp_path, environment):
    """torchrun passes SIGTERM on: the run is saved and continues; a killed torchrun leaves no worker behind."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        tiny.__file__, "--output-dir", str(tmp_path / "run"), "--steps", "400", "--step-s", "0.05",
    ]  # fmt: skip

    def start_and_wait_for_progress():
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            if line.startswith("step "):
                return process
        raise AssertionError("no progress")

    process = start_and_wait_for_progress()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=600)[0]
    assert "stopped by a signal: saved step" in rest
    step = max(int(p.name.split("_")[1]) for p in list_checkpoints(tmp_path / "run" / "checkpoints"))

    process = start_and_wait_for_progress()
    workers = [int(p) for p in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
    assert len(workers) >= 2
    process.kill()
    process.stdout.close()
    process.wait()
    deadline = time.monotonic() + 600  # none of them, in the end
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert max(int(p.name.split("_")[1]) for p in list_checkpoints(tmp_path / "run" / "checkpoints")) >= step


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_missing_device_is_named():
    with pytest.raises(ValueError, match="use --device cpu"):
        resolve_device("cuda")
