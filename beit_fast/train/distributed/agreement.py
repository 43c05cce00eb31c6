"""Ranks that train together must agree: on the configuration, the data, the model and the code."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beit_fast.train.config import RunConfig, fields_marked, flat, to_plain
from beit_fast.train.distributed.world import World
from beit_fast.version import __version__


def check_agreement(world: World, values: dict[str, Any]) -> None:
    """Compare JSON values over all ranks, which all have to call it.

    Raises:
        ValueError: on every rank, with each field that differs and what each rank has there.
    """
    ranks = [json.loads(text) for text in world.gather(json.dumps({k: _short(v) for k, v in values.items()}))]
    names = sorted(set().union(*ranks))
    differing = []
    for name in names:
        by_rank = [own.get(name, "nothing") for own in ranks]
        if any(value != by_rank[0] for value in by_rank):
            differing.append(f"{name} (" + ", ".join(f"rank {r}: {value}" for r, value in enumerate(by_rank)) + ")")
    if differing:
        raise ValueError(f"the processes of this run differ in {'; '.join(differing)}; start all of them alike")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_settings(world: World, config: RunConfig, task: str) -> None:
    """Compare, before anything is opened, the configuration but for what is local, and the code."""
    if world.size > 1:
        local = fields_marked(config, "local")
        values = {name: value for name, value in flat(to_plain(config)).items() if name not in local}
        code = {"task": task, "beit_fast": __version__, "code": code_hash(), "torch": torch.__version__}
        check_agreement(world, values | code)


def check_built(world: World, identity: dict[str, Any], model: nn.Module, precision: str) -> None:
    """Compare, before the first step, data, initial weights, kind of device and precision."""
    if world.size > 1:
        machine = {"model": weights_hash(model), "device": world.device.type, "precision": precision}
        check_agreement(world, identity | machine)


def code_hash() -> str:
    """Sixteen hexadecimal digits of the Python sources of the package, kernels included."""
    sha = hashlib.sha256()
    root = Path(__file__).parents[2]
    for folder in (root, root / "kernels"):
        for path in sorted(folder.resolve().rglob("*.py")):
            sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def weights_hash(model: nn.Module) -> str:
    """Names, shapes and bytes of a model's parameters and buffers, as eight hexadecimal digits."""
    crc = 0
    for name, tensor in sorted(model.state_dict().items()):
        crc = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), crc)
        crc = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
