"""R22, R23: BEiT v2's tokenizer, whose codes learn outside the optimizer, and pre-training with the extra head."""

import random
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.metrics import read_metrics

FSDP = ("--parallel", "fsdp2")


@dataclass
class Kind:
    """A kind of run: its row of the table, its steps, and what a rank may be started with by mistake."""

    row: str
    what: str
    steps: int
    differences: dict[str, tuple[str, object]]


KINDS = {
    "tokenizer": Kind(
        "R22", "BEiT v2's tokenizer", 8,
        {"decay": ("--decay", 0.9), "teacher.normalization": ("--teacher.normalization", "imagenet"),
         "model.vocab_size": ("--model.vocab-size", 25)},
    ),
    "two_heads": Kind("R23", "pre-training with BEiT v2's extra head", 12, {"head_layers": ("--head-layers", 2)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def train(ranks, tmp_path_factory):
    """`train(kind, name, count, *arguments)`: how it ended, and its folder; runs of a name continue each other."""
    root = tmp_path_factory.mktemp("beitv2")

    def run(kind, name, count, *arguments, **job):
        own = ("--data.cache-dir", root / "cache") if kind == "tokenizer" else ("--head-layers", 1)
        task = "vqkd" if kind == "tokenizer" else "beit"
        folder = root / kind / name
        folder.parent.mkdir(exist_ok=True)
        return ranks.run(folder, count, *own, *arguments, task=task, **job), folder

    return run


@pytest.fixture(scope="module")
def unbroken(train, state_of):
    """The state at the end of an undisturbed run of two ranks, by kind and options, and its folder."""
    known = {}

    def end(kind, *arguments):
        if (kind, arguments) not in known:
            done, folder = train(kind, f"unbroken{len(arguments)}", 2, *arguments)
            assert done.code == 0, done.log
            known[kind, arguments] = state_of(folder), folder
            assert known[kind, arguments][0][0] == KINDS[kind].steps
        return known[kind, arguments]

    return end


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def largest_difference(one, folders):
    pairs = [pair for folder in folders for pair in zip(losses(one), losses(folder), strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def test_a_tokenizer_of_two_ranks_is_that_of_one(train, unbroken, outcome):
    """K-means on the latents of both, codes and counts of the global batch."""
    done, one = train("tokenizer", "one", 1)
    assert done.code == 0, done.log
    two = unbroken("tokenizer")[1]
    worst = largest_difference(one, [two])
    one, two = (load_file(folder / "tokenizer.safetensors") for folder in (one, two))
    assert torch.equal(one["quantize.cluster_size"], two["quantize.cluster_size"])
    torch.testing.assert_close(one["quantize.embedding.weight"], two["quantize.embedding.weight"], rtol=1e-4, atol=1e-5)
    outcome("R22", "BEiT v2's tokenizer: losses of two ranks against one, fp32", 1, int(worst < 1e-5), "1e-5",
            f"largest difference {worst:.1e}")  # fmt: skip


def test_two_heads_train_alike_in_any_world(train, unbroken, outcome):
    """DDP and FSDP2, whose extra blocks are split like the others."""
    done, one = train("two_heads", "one", 1)
    assert done.code == 0, done.log
    worst = largest_difference(one, [unbroken("two_heads")[1], unbroken("two_heads", *FSDP)[1]])
    what = "pre-training with BEiT v2's extra head: losses of DDP and FSDP2 against one process, fp32"
    outcome("R23", what, 2, 2 if worst < 1e-6 else 0, "1e-6", f"largest difference {worst:.1e}")


STOPS = [
    ("tokenizer", 1, ()),  # just after the codes began
    *(pytest.param("tokenizer", stop, (), marks=pytest.mark.slow) for stop in range(2, 8)),
    *(pytest.param("two_heads", stop, how, marks=pytest.mark.slow) for stop in (3, 5, 7, 11) for how in ((), FSDP)),
]


@pytest.mark.parametrize(("kind", "stop", "how"), STOPS)
def test_resume_is_bit_exact(train, unbroken, state_of, outcome, kind, stop, how):
    name = f"stopped{stop}{len(how)}"
    assert train(kind, name, 2, *how, "--max-steps", stop)[0].code == 0
    done, folder = train(kind, name, 2, *how)
    assert done.code == 0, done.log
    what = f"{KINDS[kind].what}: stopped at a step and continued: SHA-256 of the whole state at the end"
    outcome(KINDS[kind].row, what, 1, int(state_of(folder) == unbroken(kind, *how)[0]), "all")


def interrupted(train, kind, trial, rng):
    """A rank killed at any time, the whole tree, or a rank within a save; whether it was hit, and the run's end."""
    fault = ("rank", "tree", "save")[trial % 3]
    how = FSDP if kind == "two_heads" and trial % 2 else ()
    for attempt in range(10):
        name = f"killed{trial}_{attempt}"
        if fault == "tree":
            done, folder = train(kind, name, 2, *how, kill_tree_s=rng.uniform(0.3, 1.5))
            hit = done.killed
            done, folder = train(kind, name, 2, *how)
        else:
            rank = rng.randrange(2) if how or fault == "rank" else 0
            moment = {"kill_s": rng.uniform(0, 0.3)} if fault == "rank" else {"save_call": rng.randrange(8, 25)}
            done, folder = train(kind, name, 2, *how, faults={"0": {"rank": rank, **moment}})
            hit = "ended by SIGKILL; starting all" in done.log
        if hit:
            return done, folder, how
    raise AssertionError(f"{fault}: ten kills came too late; {done.log}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills(train, unbroken, state_of, outcome, kind):
    """The launcher starts all again; after the whole tree was killed, the same command does."""
    rng, trials, passed = random.Random(0), 12, 0
    for trial in range(trials):
        done, folder, how = interrupted(train, kind, trial, rng)
        passed += (done.code, done.hung) == (0, False) and state_of(folder) == unbroken(kind, *how)[0]
    what = f"{KINDS[kind].what}: kill -9 of a rank, of all, or within a save: the same bits at the end, no hang"
    outcome(KINDS[kind].row, what, trials, passed, str(trials))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damage(train, unbroken, state_of, outcome, kind):
    """The newest checkpoint damaged: it is set aside, the one before it is taken."""
    rng, trials, passed = random.Random(1), 6, 0
    stop = KINDS[kind].steps - 2
    for trial in range(trials):
        folder = train(kind, f"damaged{trial}", 2, "--max-steps", stop)[1]
        files = sorted(path for path in list_checkpoints(folder / "checkpoints")[-1].rglob("*") if path.is_file())
        path = files[trial % len(files)]
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        done, folder = train(kind, f"damaged{trial}", 2)
        aside = (folder / "checkpoints" / f"damaged-step_{stop:08d}").is_dir()
        passed += done.code == 0 and aside and state_of(folder) == unbroken(kind)[0]
    what = f"{KINDS[kind].what}: a bit of the newest checkpoint flipped: the one before, the same bits"
    outcome(KINDS[kind].row, what, trials, passed, "all")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in KINDS[kind].differences])
def test_ranks_that_differ_are_named(train, outcome, kind, name):
    option, value = KINDS[kind].differences[name]
    done, folder = train(kind, f"differs_{name}", 2, faults={"0": {"rank": 1, "differs": [option, str(value)]}})
    lines = [line for line in done.log.splitlines() if line.startswith("error") and f"{name} (rank 0: " in line]
    passed = done.code == 1 and not done.hung and len(lines) == 2 and not list_checkpoints(folder / "checkpoints")
    fields = ", ".join(KINDS[kind].differences)
    what = f"{KINDS[kind].what}: ranks that differ in one of {len(KINDS[kind].differences)}: {fields}"
    outcome(KINDS[kind].row, what, 1, int(passed), "named by all ranks before the first step")
