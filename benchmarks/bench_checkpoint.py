"""Saving a training state and reading it back: beit_fast's verified checkpoints beside torch's and safetensors'.

    pytest benchmarks/bench_checkpoint.py --benchmark-only

The state is that of a run: weights and both moments of AdamW. beit_fast writes to a temporary folder, computes a crc32
of every file, syncs and renames; the baselines write one file, and only those that say so sync it. Reading back is
timed with the files in the page cache; everyone then holds all tensors. Saved tensors are compared with the originals.
"""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.train.checkpoint.format import newest_checkpoint, save_checkpoint
from benchmarks.harness import OURS, Comparison, Implementation

VERIFIED = "beit_fast, verified only"
NAMES = [OURS, "torch.save, synced", "torch.save", "safetensors, synced", "torch.distributed.checkpoint"]
READERS = [OURS, VERIFIED, "torch.load", "safetensors", "torch.distributed.checkpoint"]
State = dict[str, Tensor]


def cases(scale: Any) -> dict[str, Any]:
    sizes = scale.pick(tiny=("tiny",), cpu=("small",), gpu=("base",), full=("base", "large"))
    return {size: (size, scale.name == "tiny") for size in sizes}


def training_state(size: Any, tiny: bool) -> State:
    small: dict[str, Any] = {"depth": 1, "vocab_size": 64} if tiny else {}
    torch.manual_seed(0)
    with torch.device("meta"):  # names and shapes; drawing initial weights would take longer than saving them
        weights = BeitForMaskedImageModeling(BeitConfig.from_preset(size, **small)).state_dict()
    return {name + slot: torch.rand(t.shape) for name, t in weights.items() for slot in ("", ".exp_avg", ".sq")}


def write_ours(state: State, folder: Path) -> Path:
    return save_checkpoint(folder, 1, {"state": state}, {}, keep=2)


def read_ours(path: Path) -> State:
    found, _ = newest_checkpoint(path.parent)
    assert found is not None
    return dict(found.tensors("state"))


def to_file(save: Callable[[State, Path], Any], sync: bool) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        path = folder / "state"
        save(state, path)
        if sync:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return path

    return write


def write_distributed(state: State, folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def read_distributed(path: Path, like: State) -> State:
    state = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


WRITERS: dict[str, Callable[[State, Path], Path]] = {
    OURS: write_ours,
    "torch.save, synced": to_file(torch.save, True),
    "torch.save": to_file(torch.save, False),
    "safetensors, synced": to_file(save_file, True),
    "torch.distributed.checkpoint": write_distributed,
}


def read(name: str, path: Path, like: State) -> State:
    """What was written by that name."""
    if name == OURS:
        return read_ours(path)
    if name == "torch.distributed.checkpoint":
        return read_distributed(path, like)
    return load_file(path) if name.startswith("safetensors") else torch.load(path)


def few(state: State) -> State:
    """What is compared: some tensors, and how many there are."""
    names = sorted(state)
    return {**{name: state[name] for name in names[:: max(1, len(names) // 5)]}, "count": torch.tensor(len(names))}


def saving(size: Any, tiny: bool, folder: Path) -> Comparison:
    state = training_state(size, tiny)

    def saver(name: str) -> Implementation:
        """Writes under a new name every time and removes what it wrote before."""
        numbers, own = itertools.count(), folder / name.replace(" ", "_")

        def write() -> Path:
            shutil.rmtree(own, ignore_errors=True)
            place = own / f"{next(numbers)}"
            place.mkdir(parents=True)
            return WRITERS[name](state, place)

        return Implementation(write, lambda: few(read(name, write(), state)))

    return comparison(f"checkpoint, save: BEiT-{size} with AdamW", "", state, dict.fromkeys(NAMES, saver))


def reading(size: Any, tiny: bool, folder: Path) -> Comparison:
    state, paths = training_state(size, tiny), dict[str, Path]()
    for name, writer in {OURS: OURS, "torch.load": "torch.save", "safetensors": "safetensors, synced",
                         "torch.distributed.checkpoint": "torch.distributed.checkpoint"}.items():  # fmt: skip
        place = folder / name
        place.mkdir(parents=True)
        paths[name] = WRITERS[writer](state, place)

    def reader(name: str) -> Implementation:
        if name == VERIFIED:
            return Implementation(lambda: newest_checkpoint(paths[OURS].parent))
        return Implementation(lambda: read(name, paths[name], state), lambda: few(read(name, paths[name], state)))

    title = f"checkpoint, verify and read: BEiT-{size} with AdamW"
    return comparison(title, ", from the page cache", state, dict.fromkeys(READERS, reader))


def comparison(title: str, more: str, state: State, makers: dict[str, Callable[[str], Implementation]]) -> Comparison:
    count = sum(t.numel() * t.element_size() for t in state.values())
    return Comparison(
        group=f"{title}, {count / 2**20:.0f} MiB{more}",
        implementations={name: lambda name=name, make=make: make(name) for name, make in makers.items()},  # type: ignore[misc]
        shapes={"mib": round(count / 2**20)}, bytes=float(count), tolerance=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_save(interleaved, case, name, tmp_path_factory):
    interleaved(("save", case), lambda: saving(*case, tmp_path_factory.mktemp("save")), name, 12.0)


@pytest.mark.parametrize("name", READERS)
def test_verify_and_read(interleaved, case, name, tmp_path_factory):
    interleaved(("read", case), lambda: reading(*case, tmp_path_factory.mktemp("read")), name, 12.0)
