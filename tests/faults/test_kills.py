"""R1, R2, R5, R8, R9, R10: stopped, killed or told to stop anywhere, a run ends in the same bits."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from beit_fast.train.checkpoint.format import list_checkpoints

STEPS = 30
HARD = ("--steps", STEPS, "--checkpoint.every-steps", 3, "--dropout", 0.2, "--optim.ema-decay", 0.9)
MODES = {
    "one": (1, (*HARD, "--batch-per-device", 3)),
    "ddp": (2, (*HARD, "--batch-per-device", 3)),
    "background": (2, (*HARD, "--checkpoint.background", "on")),
    "fsdp2": (2, (*HARD, "--parallel", "fsdp2", "--checkpoint.background", "on")),
}


@pytest.fixture(scope="module")
def unbroken(ranks, tmp_path_factory, state_of):
    """(step, SHA-256) at the end of an undisturbed run, by mode."""
    root, known = tmp_path_factory.mktemp("unbroken"), {}

    def end(mode):
        if mode not in known:
            count, arguments = MODES[mode]
            done = ranks.run(root / mode, count, *arguments)
            assert done.code == 0, done.log
            known[mode] = state_of(root / mode)
            assert known[mode][0] == STEPS
        return known[mode]

    return end


def stop_and_go_on(ranks, state_of, folder, mode, stop):
    count, arguments = MODES[mode]
    assert ranks.run(folder, count, *arguments, "--max-steps", stop).code == 0
    done = ranks.run(folder, count, *arguments)
    assert done.code == 0, done.log
    return state_of(folder)


@pytest.mark.parametrize(("mode", "stop"), [("ddp", 7), ("fsdp2", 11)])
def test_resume_is_bit_exact(ranks, tmp_path, state_of, unbroken, mode, stop):
    assert stop_and_go_on(ranks, state_of, tmp_path / "run", mode, stop) == unbroken(mode)


@pytest.mark.slow
@pytest.mark.long
def test_resume_is_bit_exact_from_every_step(ranks, tmp_path, state_of, unbroken, outcome):
    """Every stop point with one process; every third with two, DDP and FSDP2."""
    cases = [("one", s) for s in range(1, STEPS)] + [(m, s) for m in ("ddp", "fsdp2") for s in range(2, STEPS, 3)]
    passed = sum(
        stop_and_go_on(ranks, state_of, tmp_path / f"{mode}{stop}", mode, stop) == unbroken(mode)
        for mode, stop in cases
    )
    outcome("R1", "stopped at a step and continued: SHA-256 of the whole state at the end", len(cases), passed, "all")


def kill(ranks, folder, mode, kind, rng):
    """One kill, and the same command until the run is complete; whether the kill hit, and how it went on."""
    count, arguments = MODES[mode]
    slow = (*arguments, "--step-s", 0.02)
    job = {"limit_s": 240}
    if kind == "rank":
        job["faults"] = {"0": {"rank": rng.randrange(count), "kill_s": rng.uniform(0.0, 0.5)}}
    elif kind == "save":
        # FSDP2 writes on every rank, the others on rank 0; a save has about ten calls
        rank = rng.randrange(count) if mode == "fsdp2" else 0
        job["faults"] = {"0": {"rank": rank, "save_call": rng.randrange(8, 45)}}
    else:
        job["kill_tree_s"] = rng.uniform(0.3, 1.0)
    first = ranks.run(folder, count, *slow, **job)
    if kind == "tree":
        hit, complete = first.killed, False
    else:
        hit, complete = "ended by SIGKILL; starting all" in first.log, first.code == 0
    if not complete and not first.hung:
        again = ranks.run(folder, count, *arguments)
        complete = again.code == 0
        first.log += again.log
    return hit, complete and not first.hung, first


KINDS = ("rank", "tree", "save")


def kill_until_it_hits(ranks, state_of, unbroken, root, mode, kind, rng):
    """A kill that came when the run was over already does not count, and is tried again."""
    for attempt in range(10):
        folder = root / f"{mode}_{kind}_{attempt}_{rng.randrange(10**9)}"
        hit, complete, first = kill(ranks, folder, mode, kind, rng)
        if hit:
            assert complete, first.log
            return state_of(folder) == unbroken(mode)
    raise AssertionError(f"{kind}: ten kills came too late; {first.log}")


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9(ranks, tmp_path, state_of, unbroken, kind):
    rng = random.Random(kind)
    mode = "fsdp2" if kind == "save" else "background"
    assert kill_until_it_hits(ranks, state_of, unbroken, tmp_path, mode, kind, rng)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_twenty_times(ranks, tmp_path, state_of, unbroken, kind, outcome):
    rng = random.Random(f"twenty {kind}")
    modes = [("ddp", "background", "fsdp2")[i % 3] for i in range(20)]
    passed = sum(kill_until_it_hits(ranks, state_of, unbroken, tmp_path, mode, kind, rng) for mode in modes)
    what = {"rank": "one rank, the launcher starts all again", "tree": "the whole tree, the same command again",
            "save": "inside a save, at any of its system calls"}[kind]  # fmt: skip
    outcome("R2", f"kill -9 of {what}: the same bits at the end, no hang", 20, passed, "20")


def told_to_stop(ranks, state_of, folder, mode, number, step):
    """A signal to one rank while it prepares a step; saved at most one step later, exit code 75, then the same bits."""
    count, arguments = MODES[mode]
    began = time.monotonic()
    done = ranks.run(
        folder, count, *arguments, faults={"0": {"rank": count - 1, "signal": number, "step": step}},
    )  # fmt: skip
    took = time.monotonic() - began
    saved = int(re.search(r"saved step (\d+); the same command continues", done.log)[1])
    assert step + 1 <= saved <= step + 2, (step, saved)
    assert done.code == 75, done.log
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"step_{saved:08d}"
    assert ranks.run(folder, count, *arguments).code == 0
    return state_of(folder), took


def test_a_signal_saves_and_exits_75(ranks, tmp_path, state_of, unbroken):
    end, _ = told_to_stop(ranks, state_of, tmp_path / "run", "background", signal.SIGUSR1, 10)
    assert end == unbroken("background")


@pytest.mark.slow
@pytest.mark.long
def test_signals_at_random_steps(ranks, tmp_path, state_of, unbroken, outcome):
    rng = random.Random(5)
    passed, longest = 0, 0.0
    for trial in range(10):
        mode = ("one", "ddp", "background", "fsdp2")[trial % 4]
        number = (signal.SIGTERM, signal.SIGUSR1)[trial % 2]
        end, took = told_to_stop(
            ranks, state_of, tmp_path / str(trial), mode, number, rng.randrange(2, STEPS - 4)
        )  # fmt: skip
        passed += end == unbroken(mode)
        longest = max(longest, took)
    outcome("R5", "SIGTERM or SIGUSR1 to one rank: saved at most one step later, exit code 75, the same bits", 10,
            passed, "all", f"start, training and save took at most {longest:.1f} s")  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_reaches_the_run(ranks, tmp_path, number):
    """What a user or a scheduler signals is the launcher; it waits for the save and hands its exit code on."""
    done = ranks.run(tmp_path / "run", 2, "--steps", 400, "--step-s", 0.05, signal_tree=[number, 2.0], limit_s=240)
    assert (done.code, done.hung) == (75, False), done.log
    assert "stopped by a signal" in done.log


def test_no_orphans_of_the_launcher(ranks, tmp_path, survivors):
    done = ranks.run(tmp_path / "run", 2, "--steps", 400, "--step-s", 0.05, kill_tree_s=2.0)
    assert done.killed
    assert len(done.pids) == 2
    assert survivors(done.pids, 120) == []


def test_a_wrong_option_is_not_tried_again(ranks, tmp_path):
    done = ranks.run(tmp_path / "run", 2, "--optim.lrr", 3)
    assert done.code == 2
    assert len(done.pids) == 2


@pytest.mark.slow
@pytest.mark.long
def test_determinism(ranks, tmp_path, state_of, outcome):
    """R10: the same command twice."""
    cases = [("tiny", mode) for mode in MODES] + [("beit", "ddp"), ("beit", "fsdp2")]
    passed = 0
    for task, mode in cases:
        count, arguments = MODES[mode]
        if task == "beit":
            arguments = ("--parallel", mode)
        folders = [tmp_path / f"{task}_{mode}_{i}" for i in range(2)]
        assert all(ranks.run(folder, count, *arguments, task=task).code == 0 for folder in folders)
        passed += state_of(folders[0]) == state_of(folders[1])
    outcome("R10", "the same command twice: SHA-256 of the whole state", len(cases), passed, "all")


RESTARTED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import tiny_task as tiny
from beit_fast.cli.train import main
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
if attempt < 2:
    prepare = tiny.TinyTask.prepare
    def dying(self, batch, step):
        if rank == "1" and step == 5 + 4 * attempt:
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(self, batch, step)
    tiny.TinyTask.prepare = dying
import torch
torch.set_num_threads(1)
main(tiny.RECIPE, tiny.TinyTask)
"""


def torchrun(tmp_path, *arguments):
    program = tmp_path / "restarted.py"
    program.write_text(RESTARTED)
    from pathlib import Path

    train = Path(__file__).parents[1] / "train"
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "4",
        "--monitor-interval", "0.2", str(program), str(train), *map(str, arguments),
    ]  # fmt: skip
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_restarts(tmp_path, ranks, state_of, outcome):
    """R8: a rank killed twice under torchrun --max-restarts 4, with the setting that recipes/slurm and docs name."""
    whole = ("--steps", 20, "--device", "cpu")
    assert ranks.run(tmp_path / "whole", 2, *whole[:2]).code == 0
    passed, longest, trials = 0, 0.0, int(os.environ.get("BEIT_FAST_TORCHRUN_TRIALS", "10"))
    for trial in range(trials):
        began = time.monotonic()
        process = torchrun(tmp_path, "--output-dir", tmp_path / f"run{trial}", *whole)
        try:
            process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        longest = max(longest, time.monotonic() - began)
        passed += process.returncode == 0 and state_of(tmp_path / f"run{trial}") == state_of(tmp_path / "whole")
    outcome("R8", "torchrun: a rank killed twice, --max-restarts 4", trials, passed, "all",
            f"longest from start to end {longest:.0f} s")  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
def test_no_orphans_of_torchrun(tmp_path, survivors, ranks, outcome):
    """R9: SIGKILL to the agent, of torchrun and of our launcher."""
    passed = 0
    process = torchrun(tmp_path, "--output-dir", tmp_path / "run", "--steps", 4000, "--step-s", 0.05, "--device", "cpu")
    for line in process.stdout:
        if line.startswith("step "):
            break
    workers = [int(p) for p in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
    process.kill()
    process.stdout.close()
    process.wait()
    passed += len(workers) >= 2 and survivors(workers, 120) == []
    for trial in range(9):
        done = ranks.run(tmp_path / f"own{trial}", 2, "--steps", 4000, "--step-s", 0.05, kill_tree_s=0.5 + 0.2 * trial)
        passed += done.killed and survivors(done.pids, 120) == []
    outcome("R9", "SIGKILL to the launcher (torchrun once, --gpus nine times): no worker after 5 s", 10, passed, "all")
