"""R6 and its neighbours: losses and gradients that are not finite, spikes, memory, a rank that never answers."""

import json
import re
import resource

import pytest
import torch

from beit_fast.train import memory
from beit_fast.train.anomalies import MEMORY_STEPS, Anomalies
from beit_fast.train.checkpoint.format import list_checkpoints, read_verified
from beit_fast.train.checkpoint.resharding import whole_tensors
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.metrics import read_metrics

CPU = World(0, 1, torch.device("cpu"))


def saved(folder, step):
    found = read_verified(folder / "checkpoints" / f"step_{step:08d}")
    return {f"{n}/{k}": t for n in ("model", "optimizer", "ema") for k, t in whole_tensors(found, n)}


def is_no_op(folder, step):
    """Whether step number `step` changed no bit of weights, moments, counts or averages."""
    before, after = saved(folder, step - 1), saved(folder, step)
    return all(torch.equal(before[name], after[name]) for name in before)


FSDP = ("--parallel", "fsdp2")
PLACES = ["loss", "image", "blocks.1.mlp.fc1.weight"]


def skip_and_replay(ranks, folder, count, how, place, rank):
    """Poison step 6 on one rank; the evidence that it was skipped, written down and can be repeated."""
    poison = f"5,{rank},{place}"
    done = ranks.run(
        folder, count, *how, "--bad", poison, "--max-steps", 8, "--checkpoint.every-steps", 1, "--checkpoint.keep", 4,
        task="beit",
    )  # fmt: skip
    assert done.code == 0, done.log
    assert is_no_op(folder, 6)
    assert not is_no_op(folder, 7)
    line = next(x for x in read_metrics(folder / "metrics.jsonl") if x["step"] == 6)
    assert line["skipped_steps"] == 1
    (entry,) = read_metrics(folder / "anomalies.jsonl")
    assert (entry["kind"], entry["step"], entry["replay_from"]) == ("non_finite", 6, "step_00000005")
    assert (entry["positions"], entry["epoch"]) == ([0, 12], 1)
    gradient_only = place not in PLACES[:2]
    if not gradient_only:
        assert [text == "nan" for text in entry["loss_by_rank"]] == [r == rank for r in range(count)]
    assert (folder / "replay" / "step_00000005" / "manifest.json").exists()
    # the replay needs no more than what was kept
    for path in list_checkpoints(folder / "checkpoints"):
        path.rename(path.with_name(f"gone-{path.name}"))
    done = ranks.run(folder, count, *how, "--bad", poison, "--replay", 6, task="beit")
    assert done.code == 0, done.log
    name = "step_00000006" + (f"_rank{rank}" if count > 1 else "")
    report = json.loads((folder / "replay" / f"{name}.json").read_text())
    if place == "image":
        assert report["batch_not_finite"] == []  # the batch was sound, it was spoilt on the way
        assert report["first_module_not_finite"].startswith("patch_embed")
    if gradient_only:
        assert report["loss"] != "nan"
        assert report["first_module_not_finite"] is None
        assert PLACES[2] in report["gradients_not_finite"]
    else:
        assert report["loss"] == "nan"
    assert report["weights_not_finite"] == []
    return True


def test_a_step_that_is_not_finite_is_a_no_op(ranks, tmp_path):
    skip_and_replay(ranks, tmp_path / "run", 2, (), "image", 1)


@pytest.mark.slow
@pytest.mark.long
def test_steps_that_are_not_finite_wherever_they_come_from(ranks, tmp_path, outcome):
    cases = [
        (count, how, place, rank)
        # a parameter that FSDP2 will split takes no hook that stays: there all gradients of the rank are spoilt
        for count, how, places in ((1, (), PLACES), (2, (), PLACES), (2, FSDP, [*PLACES[:2], "gradient"]))
        for place in places
        for rank in range(count)
    ]
    passed = sum(skip_and_replay(ranks, tmp_path / str(i), *case) for i, case in enumerate(cases))
    outcome("R6", "NaN in the loss, a sample or one gradient of one rank: a no-op to the bit, written down, replayed",
            len(cases), passed, "all")  # fmt: skip


def test_a_finite_loss_with_a_bad_value_is_skipped_too():
    """The loss of a rank may be infinite although its gradient is finite."""
    from beit_fast.train.optim import optimizer_step

    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([w], fused=True)
    w.grad = torch.ones(3)
    _, bad = optimizer_step(optimizer, torch.tensor(1.0), None, torch.tensor(float("inf")))
    assert bad == 1
    assert torch.equal(w.detach(), torch.ones(3))


def test_persistent_bad_steps_name_the_replay(ranks, tmp_path):
    done = ranks.run(tmp_path / "run", 1, "--bad-steps", 2, 3, 4, 5, 6, 7, "--optim.max-skipped-steps", 3)
    assert done.code == 1
    known = "those steps changed nothing, the last checkpoint is step_"
    assert re.search(rf"^error: .*{known}\d+; --replay \d+ says where it began", done.log, re.M)
    assert "unharmed" not in done.log  # finite steps before may have ruined the weights


def test_replay_of_what_is_not_there(ranks, tmp_path):
    done = ranks.run(tmp_path / "nothing", 1, "--replay", 3)
    assert done.code == 1
    assert "there is no run in" in done.log
    assert ranks.run(tmp_path / "run", 1).code == 0
    done = ranks.run(tmp_path / "run", 1, "--replay", 99)
    assert "--replay 99 is none of the steps 1 to 12" in done.log


def feed(anomalies, losses, norms=None, bad=None):
    zero = torch.tensor(0.0)
    for number, loss in enumerate(losses):
        norm = torch.tensor(1.0 if norms is None else norms[number])
        found = torch.tensor(float(bad is not None and bad[number]))
        anomalies.add(torch.tensor(loss), torch.tensor(loss), norm, found, zero)


def test_spikes_are_told_from_noise():
    """Gaussian losses raise no alarm in 3,000 steps; a jump of ten deviations does, in loss or gradient."""
    generator = torch.Generator().manual_seed(0)
    noise = (5 + 0.1 * torch.randn(3000, generator=generator)).tolist()
    norms = torch.exp(0.3 * torch.randn(3000, generator=generator)).tolist()
    quiet = Anomalies(CPU)
    feed(quiet, noise, norms)
    assert quiet.read(3000) == []
    loud = Anomalies(CPU)
    spiked, jumped = list(noise), list(norms)
    spiked[700], jumped[900] = 6.0, 40.0
    feed(loud, spiked, jumped)
    found = loud.read(3000)
    assert [(x["kind"], x["step"]) for x in found] == [("loss_spike", 701), ("gradient_spike", 901)]
    assert found[0]["loss"] == 6.0
    assert found[0]["running_mean"] == pytest.approx(5, abs=0.05)
    assert found[0]["running_deviation"] == pytest.approx(0.1, rel=0.3)


def test_anomalies_go_through_a_checkpoint():
    """Stopped anywhere, the statistics and what was not written yet go on as they were."""
    losses = (2 + 0.01 * torch.randn(2 * MEMORY_STEPS, generator=torch.Generator().manual_seed(1))).tolist()
    losses[-3] = 3.0
    bad = [i == MEMORY_STEPS // 2 for i in range(len(losses))]
    whole = Anomalies(CPU)
    feed(whole, losses, bad=bad)
    for stop in (1, MEMORY_STEPS - 1, len(losses) - 2):
        first, second = Anomalies(CPU), Anomalies(CPU)
        feed(first, losses[:stop], bad=bad[:stop])
        second.load(json.loads(json.dumps(first.state(stop))))
        feed(second, losses[stop:], bad=bad[stop:])
        a, b = whole.state(len(losses)), second.state(len(losses))
        assert a == b
    assert [x["kind"] for x in whole.read(len(losses))] == ["non_finite", "loss_spike"]


def test_more_anomalies_than_slots_are_counted():
    anomalies = Anomalies(CPU)
    feed(anomalies, [float("nan")] * 20, bad=[True] * 20)
    found = anomalies.read(20)
    assert len(found) == 17
    assert found[-1] == {"kind": "more", "step": 20, "count": 4}
    assert anomalies.read(25) == []


@pytest.mark.slow
@pytest.mark.long
def test_out_of_memory_says_what_fits(program, tmp_path):
    """A real shortage: the address space is limited, and the model's batch does not fit in it."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    size = 2048
    for attempt in range(9):
        done = program(
            tmp_path / str(attempt), "--width", 2**18, "--batch-size", 2048, "--batch-per-device", size, "--samples",
            4096, "--optim.warmup-epochs", 0, "--steps", 1, preexec_fn=limit,
        )  # fmt: skip
        if done.returncode == 0:
            break
        assert done.stderr.count("\n") == 1, done.stderr
        found = re.search(r"out of memory with \d+ samples at once: .* try --batch-per-device (\d+)", done.stderr)
        assert found, done.stderr
        assert int(found[1]) < size
        size = int(found[1])
    assert attempt > 0  # it did run out, and following what it says ends in a run
    assert done.returncode == 0, done.stderr


def test_the_suggestion_is_arithmetic():
    assert memory.largest_micro_batch(80e9, 5e9, 1e9) == 64  # 0.94 x 80 - 5 = 70.2, a multiple of 8
    assert memory.largest_micro_batch(8e9, 5e9, 1e9) == 2
    assert memory.largest_micro_batch(5e9, 5e9, 1e9) == 0
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ...")
    assert memory.requested_bytes(error) == 2.5 * 2**30
    state = memory.StateMemory(weights=2**30, gradients=2**30, moments=2**31)
    text = str(memory.out_of_memory(error, RunConfig(batch_size=64, batch_per_device=1), CPU, 1, state))
    assert "--batch-per-device" not in text
    assert "2.50 GiB more were asked for" in text


@pytest.mark.slow
def test_a_rank_that_never_answers_ends_with_a_report(ranks, tmp_path):
    """One rank sleeps for ever in its data; both say where they are, and the run ends."""
    done = ranks.run(
        tmp_path / "run", 2, "--stuck", "3,1", "--hang-timeout-s", 12, task="beit", limit_s=240,
    )  # fmt: skip
    assert (done.code, done.hung) == (1, False), done.log
    assert "rank 1 of 2 stands still, training, 3 steps done: no progress for 12 s" in done.log
    stuck = (tmp_path / "run" / "hang_rank1.txt").read_text()
    assert "in prepare" in stuck
    waiting = (tmp_path / "run" / "hang_rank0.txt").read_text()
    assert "backward" in waiting  # there DDP reduces the gradients
    done = ranks.run(tmp_path / "run", 2, task="beit")
    assert done.code == 0
