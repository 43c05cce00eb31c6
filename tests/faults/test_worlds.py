"""R7: the same training on any number of processes, whole or split; a run moves between them."""

import json

import pytest
import torch

from beit_fast.train.checkpoint.format import list_checkpoints, read_verified
from beit_fast.train.checkpoint.resharding import whole_tensors
from beit_fast.train.metrics import read_metrics

FSDP = ("--parallel", "fsdp2")


def losses(folder):
    return {x["step"]: x["loss"] for x in read_metrics(folder / "metrics.jsonl") if x["kind"] == "train"}


def agree(a, b, steps=None, relative=1e-6):
    a, b = losses(a), losses(b)
    chosen = a if steps is None else steps
    assert set(chosen) <= set(a) & set(b)
    worst = max(abs(a[s] - b[s]) / abs(b[s]) for s in chosen)
    assert worst <= relative, worst
    return worst


@pytest.fixture(scope="module")
def beit(ranks, tmp_path_factory):
    """`beit(name, count, *arguments)` trains the small BEiT; runs of a name continue each other."""
    root = tmp_path_factory.mktemp("worlds")

    def run(name, count, *arguments, expected=0):
        done = ranks.run(root / name, count, *arguments, task="beit", limit_s=480)
        assert (done.code, done.hung) == (expected, False), done.log
        return root / name

    return run


@pytest.fixture(scope="module")
def one(beit):
    return beit("one", 1)


def test_ddp_and_fsdp2_equal_one_process(beit, one, outcome):
    """fp32, twelve steps, drop path, averages, clipping; with accumulation and recomputed activations too."""
    cases = {
        "ddp": (), "ddp_split": ("--batch-per-device", 3),
        "fsdp2": FSDP, "fsdp2_split": (*FSDP, "--batch-per-device", 3),
        "fsdp2_checkpointing": (*FSDP, "--grad-checkpointing"),
    }  # fmt: skip
    folders = {name: beit(name, 2, *arguments) for name, arguments in cases.items()}
    worst = max(agree(folder, one) for folder in folders.values())
    outcome("R7", "losses of DDP and FSDP2 against one process, fp32", len(cases), len(cases), "1e-6",
            f"largest difference {worst:.1e}")  # fmt: skip
    held_out = [read_metrics(f / "metrics.jsonl")[-1]["held_out_loss"] for f in (one, *folders.values())]
    assert held_out == pytest.approx([held_out[0]] * len(held_out), rel=1e-5)


MOVES = {
    "ddp2_to_1": ((2, ()), (1, ())),
    "ddp2_to_3": ((2, ()), (3, ())),
    "ddp2_to_4": ((2, ()), (4, ())),
    "fsdp2_to_1": ((2, FSDP), (1, ())),
    "fsdp2_to_3": ((2, FSDP), (3, FSDP)),
    "fsdp2_to_4": ((2, FSDP), (4, FSDP)),
    "ddp2_to_fsdp2": ((2, ()), (2, FSDP)),
    "fsdp2_to_ddp2": ((2, FSDP), (2, ())),
    "ddp1_to_fsdp4": ((1, ()), (4, FSDP)),
    "fsdp4_to_ddp2": ((4, FSDP), (2, ())),
}


def moved(beit, one, name):
    (first, how), (second, then) = MOVES[name]
    beit(name, first, *how, "--max-steps", 5)
    return agree(beit(name, second, *then, "--checkpoint.background", "on"), one, steps=range(6, 10))


def test_a_run_moves_to_another_world(beit, one):
    moved(beit, one, "fsdp2_to_1")
    moved(beit, one, "ddp2_to_fsdp2")


@pytest.mark.slow
@pytest.mark.long
def test_a_run_moves_between_all_worlds(beit, one, outcome):
    worst = max(moved(beit, one, name) for name in MOVES)
    outcome("R7", "resumed at 1, 2, 3, 4 processes, DDP and FSDP2 both ways", len(MOVES), len(MOVES), "1e-6",
            f"largest difference of a loss over the next 4 steps {worst:.1e}")  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_are_what_torch_distributed_writes(beit, tmp_path):
    """Our shards, read by the oracle: torch.distributed.checkpoint alone, as whole tensors; and they are split."""
    import torch.distributed.checkpoint as dcp

    folder = beit("shards", 2, *FSDP, "--max-steps", 2)
    found = read_verified(list_checkpoints(folder / "checkpoints")[-1])
    parts = sorted((found.path / "model").iterdir())
    assert [p.name for p in parts] == ["shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors"]
    sizes = [p.stat().st_size for p in parts]
    assert max(sizes) < 0.6 * sum(sizes)
    expected = dict(whole_tensors(found, "model"))
    state = {name: torch.full_like(tensor, -7) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(found.path / "model")), no_dist=True)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    # ... and one process that never was split holds the same weights at that step
    whole = beit("unsharded", 2, "--max-steps", 2)
    same = dict(whole_tensors(read_verified(list_checkpoints(whole / "checkpoints")[-1]), "model"))
    for name, tensor in expected.items():
        torch.testing.assert_close(tensor, same[name], rtol=1e-4, atol=1e-6, msg=name)


def test_split_weights_start_another_run(beit, tmp_path):
    """`--weights <run folder>` of a run that was split: the averaged weights that its checkpoint holds."""
    from beit_fast.models import BeitConfig, BeitForMaskedImageModeling
    from beit_fast.train.tasks.weights import load_weights

    folder = beit("shards", 2, *FSDP, "--max-steps", 2)
    config = BeitConfig.from_preset("base", "plus", image_size=32, patch_size=8, width=32, depth=3, num_heads=4,
                                    vocab_size=64)  # fmt: skip
    model = BeitForMaskedImageModeling(config)
    load_weights(model, folder, verbose=False)
    saved = read_verified(list_checkpoints(folder / "checkpoints")[-1])
    expected = dict(whole_tensors(saved, "ema"))
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in whole_tensors(saved, "model"))
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("how", [(), FSDP], ids=["ddp", "fsdp2"])
def test_compiled_blocks(beit, one, how):
    """Regional compilation under DDP and FSDP2: the same losses to rounding, one block compiled for all."""
    folder = beit(f"compiled_{len(how)}", 2, *how, "--compile")
    agree(folder, one, relative=2e-5)


def test_what_cannot_be_split_says_so(ranks, tmp_path):
    done = ranks.run(tmp_path / "apex", 1, *FSDP, "--optim.impl", "apex")
    assert done.code == 1
    assert "--parallel fsdp2 works with --optim.impl torch only" in done.log


def test_the_environment_says_what_ran(beit):
    folder = beit("ddp_once", 2, "--max-steps", 1)
    start = json.loads((folder / "environment.json").read_text())["starts"][-1]
    assert start["world_size"] == 2
