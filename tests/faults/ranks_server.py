"""Runs of several ranks without the seconds that every `import torch` takes: a process that forks them.

It reads one JSON job per line and answers with one JSON line. A job starts the real launcher
(`beit_fast.train.distributed.launch`) in a forked child, whose workers are forked in their turn; each calls the
recipe's `main` as a program would. What is to go wrong in which attempt stands in the job:

    {"count": 2, "task": "tiny", "arguments": [...], "faults": {"0": {...}}, "log": path, "kill_tree_s": null}

Faults: {"rank": 1, "kill_s": 0.4}            SIGKILL to a rank so many seconds after the first step
        {"rank": 0, "save_call": 7}           SIGKILL before the n-th system call of a save
        {"rank": 0, "ending": 0.4}            SIGKILL in between the last save and the exit, at this share of its calls
        {"rank": 1, "differs": ["--seed", 1]} another option, or `version` or `torch`, on one rank
        {"rank": 0, "signal": 15, "step": 5}  a signal to one rank while it prepares this step

Another kind of job reads a file that may be hostile: {"read": "weights", "folder": path, "limit_mib": 1024, ...}.
"""

import contextlib
import importlib.util
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import matplotlib.figure
import torch
import torch._dynamo  # an optimizer's first step imports it: once here instead of in every forked process
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

from beit_fast import Beit
from beit_fast.cli import train as cli
from beit_fast.cli.options import USER_ERRORS
from beit_fast.data.reading import read_screened
from beit_fast.data.sources import open_source
from beit_fast.models import BeitConfig, load_checkpoint
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train.distributed import launch

HERE = Path(__file__).parent
SMALL = BeitConfig.from_preset("tiny", image_size=32, patch_size=8, width=32, depth=2, num_heads=2)
MODEL = SMALL.for_classification(5)
"""Of the weights that hostile files pretend to be."""


class Forked:
    """What the launcher needs of a process."""

    def __init__(self, pid):
        self.pid, self.code = pid, None

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.005)
        return self.code


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_program(task, arguments):
    """The recipe as a program; exits."""
    torch.set_num_threads(1)
    module = TASKS[task]
    try:
        cli.main(module.RECIPE, module.TASK, demo=False, arguments=arguments)
    except SystemExit as stop:
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def die_in_save(stop_at):
    """SIGKILL before the `stop_at`-th of the system calls by which a checkpoint is written."""
    from beit_fast.train.checkpoint import format as checkpoint

    calls = 0

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    os.fsync, checkpoint.shutil.rmtree = dying(os.fsync), dying(checkpoint.shutil.rmtree)
    checkpoint.write_tensors, checkpoint.write_json = dying(checkpoint.write_tensors), dying(checkpoint.write_json)
    Path.rename = dying(Path.rename)


def die_in_ending(share, counts):
    """SIGKILL after this share of the Python calls between the last save and the exit; their number is in `counts`."""
    from beit_fast.train.engine import TrainingRun

    save, total = TrainingRun.save, int(Path(counts).read_text()) if Path(counts).exists() else None
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        calls += event == "call"
        if total is not None and calls >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    def last(self):
        save(self)
        if self.step == self.target:
            sys.setprofile(profile)

    def ending(code):
        sys.setprofile(None)
        Path(counts).write_text(str(calls))
        leave(code)

    leave, os._exit = os._exit, ending
    TrainingRun.save = last


def differ(job, option, value):
    """Start this rank with another option, or as another version."""
    from beit_fast.train.distributed import agreement

    if option == "version":
        agreement.__version__ = value
    elif option == "torch":
        torch.__version__ = value
    else:
        job["arguments"] += [option, value]


def worker(job, environment):
    os.environ.clear()
    os.environ.update(environment)
    rank, attempt = int(environment.get("RANK", 0)), environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    fault = job.get("faults", {}).get(attempt)
    if fault is not None and fault["rank"] == rank:
        if "save_call" in fault:
            die_in_save(fault["save_call"])
        if "differs" in fault:
            differ(job, *fault["differs"])
        if "ending" in fault:
            die_in_ending(fault["ending"], fault["counts"])
        if "signal" in fault:
            module = TASKS[job["task"]]
            prepare = module.TASK.prepare

            def signalled(self, batch, step):
                if step == fault["step"]:
                    os.kill(os.getpid(), fault["signal"])
                return prepare(self, batch, step)

            module.TASK.prepare = signalled
        if "kill_s" in fault:
            from beit_fast.train.engine import TrainingRun

            step = TrainingRun.train_step

            def timed(self, group):
                if not hasattr(self, "doomed"):
                    self.doomed = threading.Timer(fault["kill_s"], os.kill, (os.getpid(), signal.SIGKILL))
                    self.doomed.daemon = True
                    self.doomed.start()
                step(self, group)

            TrainingRun.train_step = timed
    if "BALLAST" in os.environ and rank == 0:  # the disk fills up while step 5 is prepared
        place, size = os.environ["BALLAST"].split(",")
        module = TASKS[job["task"]]
        ordinary = module.TASK.prepare

        def filling(self, batch, step):
            if step == 4:
                with contextlib.suppress(OSError):
                    Path(place).write_bytes(bytes(int(size)))
            return ordinary(self, batch, step)

        module.TASK.prepare = filling
    run_program(job["task"], job["arguments"])


def launcher(job):
    with open(job["log"], "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for number, target in enumerate(job.get("outputs", []), 1):  # of stdout, stderr; None: closed
        if target is None:
            os.close(number)
            setattr(sys, ("stdout", "stderr")[number - 1], None)  # as Python finds it at its start
        else:
            os.dup2(os.open(target, os.O_WRONLY), number)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", **job.get("environment", {})}

    def start(environment):
        pid = os.fork()
        if pid == 0:
            for number in launch.FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            worker(job, environment)
        with open(job["log"] + ".pids", "a") as file:
            file.write(f"{pid}\n")
        return Forked(pid)

    if job["count"] == 1:
        worker(job, dict(os.environ))
    os._exit(launch.launch(job["count"], "cpu", start))


def read_as_told(reader, folder):
    """Read an untrusted file as a user would; returns what became of it."""
    files = sorted(folder.iterdir())
    try:
        if reader == "weights":
            load_checkpoint(Beit(MODEL), files[0], verbose=False)
        elif reader == "tokenizer":
            load_tokenizer(files[0])
        elif reader == "folder":
            Beit.from_pretrained(folder)
        else:
            source = open_source(files[0])
            for index in range(min(len(source), 2000)):
                read_screened(source, index)
    except USER_ERRORS as error:
        return {"kind": "refused", "text": str(error)}
    except BaseException as error:
        return {"kind": "bug", "text": f"{type(error).__name__}: {error}"[:500]}
    return {"kind": "read", "text": ""}


def read_hostile(job):
    """In a child with `limit_mib` of memory beyond what it has: what became of the file, and seconds of a core."""
    began = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.update(job["environment"])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (job["limit_mib"] << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writing, json.dumps(read_as_told(job["read"], Path(job["folder"]))).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() - began > 600:  # it waits for something
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    code, used = os.waitstatus_to_exitcode(ended[1]), ended[2]
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    answer = json.loads(text) if text else {"kind": "dead", "text": f"exit code {code}"}
    return answer | {"seconds": used.ru_utime + used.ru_stime}


def serve():
    for line in sys.stdin:
        job = json.loads(line)
        if "read" in job:
            print(json.dumps(read_hostile(job)), flush=True)
            continue
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                launcher(job)
            os._exit(1)
        child, limit = Forked(pid), job.get("limit_s", 240)
        killed = hung = False
        signalled = job.get("signal_tree")
        while child.poll() is None:
            waited = time.monotonic() - began
            if job.get("kill_tree_s") is not None and waited > job["kill_tree_s"]:
                child.kill()
                killed = True
            if signalled and waited > signalled[1]:
                child.send_signal(signalled[0])
                signalled = None
            if waited > limit:
                hung = True
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        answer = {"code": child.wait(), "killed": killed and child.code == -9, "hung": hung,
                  "seconds": time.monotonic() - began}  # fmt: skip
        print(json.dumps(answer), flush=True)


TASKS = {
    "tiny": load("tiny_task", HERE.parent / "train" / "tiny_task.py"),
    "beit": load("beit_task", HERE / "beit_task.py"),
    "vqkd": load("vqkd_task", HERE / "vqkd_task.py"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    assert matplotlib.figure is not None  # imported here once, for every run's loss picture
    print("ready", flush=True)
    serve()
