"""Saving a training state and reading it back: beit_fast's verified checkpoints beside torch's and safetensors'.

    pytest benchmarks/bench_checkpoint.py --benchmark-only

The state is that of a run: weights and both moments of AdamW. beit_fast writes to a temporary folder, computes a crc32
of every file, syncs and renames; the rivals write one file, and only those that say so sync it. Reading back is timed
with the files in the page cache; every rival then holds all tensors. Saved tensors are compared with the originals.
"""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.train.checkpoint.format import newest_checkpoint, save_checkpoint
from benchmarks.harness import OURS, Comparison, Rival


@dataclass(frozen=True)
class Case:
    size: Any
    tiny: bool
    folder: Path
    budget_s: float = 12.0


def cases(scale: Any) -> dict[str, Any]:
    sizes = scale.pick(tiny=("tiny",), cpu=("small",), gpu=("base",), full=("base", "large"))
    return {size: (size, scale.name == "tiny") for size in sizes}


SAVERS = [OURS, "torch.save, synced", "torch.save", "safetensors, synced", "torch.distributed.checkpoint"]
READERS = ["beit_fast", "beit_fast, verified only", "torch.load", "safetensors", "torch.distributed.checkpoint"]


def training_state(case: Case) -> dict[str, Tensor]:
    small: dict[str, Any] = {"depth": 1, "vocab_size": 64} if case.tiny else {}
    torch.manual_seed(0)
    weights = BeitForMaskedImageModeling(BeitConfig.from_preset(case.size, **small)).state_dict()
    moments = {f"{name}.{slot}": torch.rand_like(t) for name, t in weights.items() for slot in ("exp_avg", "sq")}
    return {**weights, **moments}


def synced(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Savers:
    """Each writes under a new name every time and removes what it wrote before."""

    def __init__(self, case: Case) -> None:
        self.folder, self.state, self.number = case.folder, training_state(case), itertools.count(1)
        self.written: Path | None = None

    def place(self) -> Path:
        if self.written is not None and self.written.exists():
            shutil.rmtree(self.written)
        self.written = self.folder / f"{next(self.number)}"
        self.written.mkdir(parents=True)
        return self.written

    def ours(self) -> Path:
        return save_checkpoint(self.place(), 1, {"state": self.state}, {}, keep=2)

    def torch_save(self, sync: bool) -> Path:
        path = self.place() / "state.pt"
        torch.save(self.state, path)
        if sync:
            synced(path)
        return path

    def safetensors(self) -> Path:
        path = self.place() / "state.safetensors"
        save_file(self.state, path)
        synced(path)
        return path

    def distributed(self) -> Path:
        import torch.distributed.checkpoint as dcp

        path = self.place() / "dcp"
        dcp.save(self.state, checkpoint_id=path, no_dist=True)
        return path


def read_ours(path: Path) -> dict[str, Tensor]:
    found, _ = newest_checkpoint(path.parent)
    assert found is not None
    return dict(found.tensors("state"))


def read_distributed(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    state = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def few(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is compared: some tensors, and how many there are."""
    names = sorted(state)
    return {**{name: state[name] for name in names[:: max(1, len(names) // 5)]}, "count": torch.tensor(len(names))}


def save_comparison(case: Case) -> Comparison:
    def saver(write: Any, read: Any) -> Rival:
        return Rival(write, lambda: few(read(write())))

    def make(name: str) -> Rival:
        savers = Savers(Case(case.size, case.tiny, case.folder / name.replace(" ", "_")))
        return {
            OURS: lambda: saver(savers.ours, read_ours),
            "torch.save, synced": lambda: saver(lambda: savers.torch_save(True), torch.load),
            "torch.save": lambda: saver(lambda: savers.torch_save(False), torch.load),
            "safetensors, synced": lambda: saver(savers.safetensors, load_file),
            "torch.distributed.checkpoint": lambda: saver(
                savers.distributed, lambda path: read_distributed(path, savers.state)
            ),
        }[name]()

    count = sum(t.numel() * t.element_size() for t in training_state(case).values())
    return Comparison(
        group=f"checkpoint, save: BEiT-{case.size} with AdamW, {count / 2**20:.0f} MiB",
        rivals={name: lambda name=name: make(name) for name in SAVERS},  # type: ignore[misc]
        shapes={"mib": round(count / 2**20)},
        bytes=float(count),
        tolerance=0.0,
    )


def read_comparison(case: Case) -> Comparison:
    savers = Savers(case)
    state = savers.state
    paths: dict[str, Path] = {}
    for name, write in {
        "beit_fast": savers.ours,
        "torch.load": lambda: savers.torch_save(False),
        "safetensors": savers.safetensors,
        "torch.distributed.checkpoint": savers.distributed,
    }.items():
        paths[name] = write()
        savers.written = None  # kept
    count = sum(t.numel() * t.element_size() for t in state.values())

    def reader(read: Any) -> Rival:
        return Rival(read, lambda: few(read()))

    return Comparison(
        group=f"checkpoint, verify and read: BEiT-{case.size} with AdamW, {count / 2**20:.0f} MiB, from the page cache",
        rivals={
            "beit_fast": lambda: reader(lambda: read_ours(paths["beit_fast"])),
            "beit_fast, verified only": lambda: Rival(lambda: newest_checkpoint(paths["beit_fast"].parent)),
            "torch.load": lambda: reader(lambda: torch.load(paths["torch.load"])),
            "safetensors": lambda: reader(lambda: load_file(paths["safetensors"])),
            "torch.distributed.checkpoint": lambda: reader(
                lambda: read_distributed(paths["torch.distributed.checkpoint"], state)
            ),
        },
        shapes={"mib": round(count / 2**20)},
        bytes=float(count),
        tolerance=0.0,
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("rival", SAVERS)
def test_save(in_turns, case, rival, folder):
    made = Case(*case, folder / "save")
    in_turns(("save", case), lambda: save_comparison(made), rival, made.budget_s)


@pytest.mark.parametrize("rival", READERS)
def test_verify_and_read(in_turns, case, rival, folder):
    made = Case(*case, folder / "read")
    in_turns(("read", case), lambda: read_comparison(made), rival, made.budget_s)
