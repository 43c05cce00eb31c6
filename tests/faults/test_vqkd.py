"""R1, R2, R3, R7, R17 for BEiT v2's tokenizer, whose codes learn outside the optimizer."""

import random

import pytest
import torch
from safetensors.torch import load_file

from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.metrics import read_metrics


@pytest.fixture(scope="module")
def vqkd(ranks, tmp_path_factory):
    """`vqkd(name, count, *arguments)` trains it; runs of a name continue each other."""
    root = tmp_path_factory.mktemp("vqkd")

    def run(name, count, *arguments, **job):
        done = ranks.run(root / name, count, "--data.cache-dir", root / "cache", *arguments, task="vqkd", **job)
        return done, root / name

    return run


@pytest.fixture(scope="module")
def unbroken(vqkd, state_of):
    """The state at the end of an undisturbed run of two ranks, and its folder."""
    done, folder = vqkd("unbroken", 2)
    assert done.code == 0, done.log
    return state_of(folder), folder


def test_two_ranks_train_what_one_does(vqkd, unbroken, outcome):
    """K-means on the latents of both, codes and counts of the global batch."""
    done, one = vqkd("one", 1)
    assert done.code == 0, done.log
    two = unbroken[1]
    a, b = ([line["loss"] for line in read_metrics(f / "metrics.jsonl") if line["kind"] == "train"] for f in (one, two))
    worst = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
    one, two = (load_file(folder / "tokenizer.safetensors") for folder in (one, two))
    assert torch.equal(one["quantize.cluster_size"], two["quantize.cluster_size"])
    torch.testing.assert_close(one["quantize.embedding.weight"], two["quantize.embedding.weight"], rtol=1e-4, atol=1e-5)
    outcome("R7", "BEiT v2's tokenizer: losses of two ranks against one, fp32", 1, int(worst < 1e-5), "1e-5",
            f"largest difference {worst:.1e}")  # fmt: skip


@pytest.mark.parametrize("stop", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_resume_is_bit_exact(vqkd, unbroken, state_of, outcome, stop):
    """Just after the codes began, and later."""
    assert vqkd(f"stopped{stop}", 2, "--max-steps", stop)[0].code == 0
    done, folder = vqkd(f"stopped{stop}", 2)
    assert done.code == 0, done.log
    what = "BEiT v2's tokenizer: stopped at a step and continued: SHA-256 of the whole state at the end"
    outcome("R1", what, 1, int(state_of(folder) == unbroken[0]), "all")


@pytest.mark.slow
def test_kills(vqkd, unbroken, state_of, outcome):
    """A rank at any time (the launcher starts all again), the whole tree (the same command again)."""
    rng, passed = random.Random(0), 0
    for trial in range(6):
        name = f"killed{trial}"
        if trial % 2:
            fault = {"0": {"rank": trial // 2 % 2, "kill_s": rng.uniform(0, 0.5)}}
            done, folder = vqkd(name, 2, faults=fault)
        else:
            vqkd(name, 2, kill_tree_s=rng.uniform(0.5, 2.5))
            done, folder = vqkd(name, 2)
        passed += (done.code, done.hung) == (0, False) and state_of(folder) == unbroken[0]
    outcome("R2", "BEiT v2's tokenizer: kill -9 of a rank or of all: the same bits at the end, no hang", 6, passed, "6")


@pytest.mark.slow
def test_damage(vqkd, unbroken, state_of, outcome):
    """The newest checkpoint damaged: it is set aside, the one before it is taken."""
    rng, passed = random.Random(1), 0
    for trial in range(4):
        done, folder = vqkd(f"damaged{trial}", 2, "--max-steps", 6)
        files = sorted(path for path in list_checkpoints(folder / "checkpoints")[-1].rglob("*") if path.is_file())
        path = files[trial % len(files)]
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        done, folder = vqkd(f"damaged{trial}", 2)
        aside = (folder / "checkpoints" / "damaged-step_00000006").is_dir()
        passed += done.code == 0 and aside and state_of(folder) == unbroken[0]
    outcome("R3", "BEiT v2's tokenizer: a bit of the newest checkpoint flipped: the one before, the same bits", 4,
            passed, "all")  # fmt: skip


FIELDS = {"decay": ("--decay", 0.9), "teacher.normalization": ("--teacher.normalization", "imagenet"),
          "model.vocab_size": ("--model.vocab-size", 25)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIELDS))
def test_ranks_that_differ_are_named(vqkd, outcome, name):
    option, value = FIELDS[name]
    done, folder = vqkd(f"differs_{name}", 2, faults={"0": {"rank": 1, "differs": [option, str(value)]}})
    lines = [line for line in done.log.splitlines() if line.startswith("error") and f"{name} (rank 0: " in line]
    passed = done.code == 1 and not done.hung and len(lines) == 2 and not list_checkpoints(folder / "checkpoints")
    what = "BEiT v2's tokenizer: ranks that differ in decay, teacher's normalisation or codes"
    outcome("R17", what, 1, int(passed), "named by all ranks before the first step")
