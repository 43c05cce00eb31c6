"""Runs of several ranks over gloo, what is left of them, and the record of how the faults went."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from beit_fast.train.checkpoint.format import list_checkpoints, verify
from beit_fast.train.checkpoint.resharding import whole_tensors

HERE = Path(__file__).parent


@dataclass
class Outcome:
    """How a run of the launcher ended."""

    code: int
    killed: bool
    hung: bool
    seconds: float
    log: str
    pids: list


class Ranks:
    """`run(folder, count, arguments, ...)` starts a run and waits for it; see ranks_server.py."""

    def __init__(self):
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "ranks_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"},
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"

    def run(self, folder, count, *arguments, task="tiny", **job):
        log = Path(f"{folder}.log")
        before = log.stat().st_size if log.exists() else 0
        job |= {
            "count": count, "task": task, "log": str(log),
            "arguments": ["--output-dir", str(folder), "--device", "cpu", *map(str, arguments)],
        }  # fmt: skip
        print(json.dumps(job), file=self.server.stdin, flush=True)
        answer = json.loads(self.server.stdout.readline())
        pids = Path(f"{log}.pids")
        text = log.read_text()[before:] if log.exists() else ""
        found = [int(p) for p in pids.read_text().split()] if pids.exists() else []
        return Outcome(**answer, log=text, pids=found)

    def read(self, reader, folder, limit_mib=1024, **environment):
        """What became of a file of a stranger, read in a process of its own with little memory."""
        job = {"read": reader, "folder": str(folder), "limit_mib": limit_mib, "environment": environment}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=600)


@pytest.fixture(scope="session")
def ranks():
    server = Ranks()
    yield server
    server.close()


def digest(folder):
    """(step, SHA-256) of the whole state in the newest checkpoint: every tensor, and what state.json adds to them."""
    found = verify(list_checkpoints(folder / "checkpoints")[-1])
    names = sorted(name for name in ("model", "optimizer", "ema") if found.has(name))
    sha = hashlib.sha256()
    for name in names:
        for key, tensor in sorted(whole_tensors(found, name)):
            sha.update(f"{name}/{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
    kept = {key: found.state[key] for key in ("step", "interval", "anomalies", "scaler", "skipped", "epoch")}
    sha.update(json.dumps(kept, sort_keys=True).encode())
    return found.step, sha.hexdigest()


@pytest.fixture(scope="session")
def state_of():
    return digest


def alive(pids):
    """Those of the processes that still run (a zombie does not)."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.append(pid)
    return running


@pytest.fixture(scope="session")
def survivors():
    def wait(pids, seconds):
        deadline = time.monotonic() + seconds
        while alive(pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive(pids)

    return wait


@pytest.fixture
def outcome(request):
    """`outcome("R2", "kill -9", trials, passed, target, note)`: a line of the record, if one is being made.

    `cost`: steps lost, seconds until the run was at its end, artefacts missing then; the worst of the trials.
    """
    began = time.monotonic()

    def write(test, what, trials, passed, target, note="", cost=None):
        place = os.environ.get("BEIT_FAST_FAULTS_RECORD")
        if place:
            line = {"test": test, "what": what, "trials": trials, "passed": passed, "target": target, "note": note,
                    "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
            if cost is not None:
                lost, seconds, missing = cost
                line |= {"steps_lost": lost, "seconds_to_the_end": round(seconds, 1), "artefacts_missing": missing}
            with open(place, "a") as file:
                file.write(json.dumps(line) + "\n")
        assert passed == trials, f"{test} {what}: {passed} of {trials}"

    return write


@pytest.fixture(scope="session")
def program():
    """Runs the tiny recipe as a program of its own: `program(folder, "--steps", 5)`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}

    def run(folder, *arguments, **options):
        tiny = HERE.parent / "train" / "tiny_task.py"
        command = [sys.executable, str(tiny), "--output-dir", str(folder), "--device", "cpu", *map(str, arguments)]
        environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, **options)

    return run
