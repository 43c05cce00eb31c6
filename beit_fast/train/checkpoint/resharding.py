"""Tensors that FSDP2 split over the ranks: writing each rank's part, reading them at any other world size.

The files are the safetensors layout of torch.distributed.checkpoint, which also reads them: whole tensors and parts,
each rank just what it needs. Its other layout is not used, because its index is a pickle.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.train.checkpoint import format as checkpoint
from beit_fast.train.checkpoint.format import Checkpoint, part_of, tensor_bytes


def restore_tensors(saved: Checkpoint, name: str, targets: Mapping[str, Tensor], what: str) -> None:
    """Copy `name` (`model`, `optimizer`, `ema`) of a checkpoint into live tensors, split or whole on either side.

    Raises ValueError where names or shapes differ.
    """
    if not saved.is_sharded(name):
        checkpoint.copy_into(targets, saved.tensors(name), what)
        return
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(saved.path / name))
    shapes = {key: tuple(entry.size) for key, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    checkpoint.compare(shapes, targets, what)
    _load(dict(targets), reader)


def _load(targets: dict[str, Tensor], reader: Any) -> None:
    """Fill tensors, each rank by itself, so that no rank waits for another."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():  # "assuming the intent is to load in a single process": it is
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(targets, storage_reader=reader, no_dist=True)


def saved_names(saved: Checkpoint, name: str) -> set[str]:
    """Names of the tensors in `name`."""
    if not saved.is_sharded(name):
        return set(saved.names(name))
    return set().union(*(names_in(path) for path in (saved.path / name).glob("*.safetensors")))


def names_in(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file."""
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path} is damaged: its header is no JSON; --resume-from takes another step") from None
    return {key for key in header if key != "__metadata__"}


def whole_tensors(saved: Checkpoint, name: str) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) of `name`, whole, also where they were saved in parts."""
    if not saved.is_sharded(name):
        yield from saved.tensors(name)
        return
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(saved.path / name))
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        target = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}  # type: ignore[union-attr]
        _load(target, reader)
        yield key, target[key]


def own_parts(tensors: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, Sequence[int]]]:
    """What this rank writes: its parts of split tensors and where they begin; rank 0 also what is not split."""
    parts: dict[str, Tensor] = {}
    offsets: dict[str, Sequence[int]] = {}
    for name, tensor in tensors.items():
        split = hasattr(tensor, "to_local")
        local, begin = part_of(tensor)
        if (split and local.numel()) or (not split and rank == 0):
            parts[name], offsets[name] = local, begin
    return parts, offsets


def save_sharded(
    root: Path,
    step: int,
    parts: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Sequence[int]]]],
    state: Mapping[str, Any],
    keep: int,
    rank: int,
    size: int,
    barrier: Callable[[], None],
) -> Path:
    """The checkpoint of `step`, of which every rank writes its part; called by all of them.

    Rank 0 commits it once all parts are on the disk, which all ranks share. Raises OSError on the rank that cannot
    write, and on rank 0.
    """
    final, work = root / f"{checkpoint.PREFIX}{step:08d}", root / f".tmp-{step:08d}-parts"
    if final.exists():
        barrier()
        return final
    failure: OSError | None = None
    try:
        work.mkdir(parents=True, exist_ok=True)
        entries: dict[str, dict[str, int]] = {}
        for name, (tensors, offsets) in parts.items():
            file = f"{name}/shard-{rank + 1:05d}-of-{size:05d}.safetensors"
            entries |= checkpoint.write_entry(work, file, tensors, offsets)
        checkpoint.write_json(work / f"part-{rank}.json", entries)
    except OSError as error:
        failure = error
    barrier()
    try:
        if failure is not None:
            raise failure
        if rank == 0:
            _commit_parts(work, final, size, dict(state) | {"step": step})
            checkpoint.drop_old(root, keep)
    except OSError as error:
        need = sum(tensor_bytes(tensors) for tensors, _ in parts.values())
        named = checkpoint.disk_error(error, root, step, need)  # what is left of the disk before the removal
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise named from error
    finally:
        barrier()
    return final


def _commit_parts(work: Path, final: Path, size: int, state: Mapping[str, Any]) -> None:
    entries: dict[str, dict[str, int]] = {}
    for rank in range(size):
        path = work / f"part-{rank}.json"
        if not path.exists():
            raise OSError(f"rank {rank} did not write its part; its own message says why")
        entries |= json.loads(path.read_text())
    for rank in range(size):
        with contextlib.suppress(OSError):
            (work / f"part-{rank}.json").unlink()
    checkpoint.commit(work, final, entries, state)
