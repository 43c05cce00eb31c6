"""Checkpoints that survive kills, full disks and flipped bits.

One folder per checkpoint, `step_00001000/`: safetensors files, `state.json`, and `manifest.json` with size and crc32
of every file. It is written under a temporary name, synced, and renamed, never written over; reading takes the newest
whose manifest holds. Whole tensors lie in `model.safetensors` and the like; where FSDP2 split them, each rank writes
its part, `model/shard-00001-of-00008.safetensors` (`resharding.py`). Neither form holds a pickle.
"""

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from beit_fast.data.sources.writing import FULL, WriteError, mib, write_error

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step_"
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class DamagedCheckpoint(ValueError):
    """A checkpoint that does not verify; the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, CPU tensor) of `<name>.safetensors`, one at a time; of whole tensors only (see `is_sharded`)."""
        with safe_open(str(self.path / f"{name}.safetensors"), framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                yield key, file.get_tensor(key)

    def names(self, name: str) -> list[str]:
        """Names of the whole tensors in `<name>.safetensors`."""
        with safe_open(str(self.path / f"{name}.safetensors"), framework="pt", device="cpu") as file:
            return list(file.keys())

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists() or self.is_sharded(name)

    def is_sharded(self, name: str) -> bool:
        """Whether these tensors are split over the files of a folder."""
        return (self.path / name).is_dir()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None = None) -> int:
    """Write a safetensors file one tensor at a time and sync it; returns its crc32.

    At most one tensor is copied at a time (to the host, or to make it contiguous), so the file may be larger than the
    memory that is left.

    Args:
        offsets: of parts of tensors, where in the whole one each begins.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    if offsets is not None:
        info = {name: {"saved_offsets": list(offsets[name])} for name, _ in ordered}
        header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)}
    begin = 0
    for name, tensor in ordered:
        end = begin + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        start = len(text).to_bytes(8, "little") + text
        file.write(start)
        crc = zlib.crc32(start)
        for _, tensor in ordered:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            crc = zlib.crc32(data, crc)
        file.flush()
        os.fsync(file.fileno())
    return crc


def write_json(path: Path, value: Any) -> int:
    """Write a small JSON file atomically; returns its crc32."""
    data = (json.dumps(value, indent=1) + "\n").encode()
    write_atomically(path, data)
    return zlib.crc32(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is the old one or the new one at any moment; OSError names it."""
    work = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with work.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except OSError as error:
        named = write_error(error, path, len(data))  # what is left of the disk before the removal
        with contextlib.suppress(OSError):
            work.unlink()
        raise named from error
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if path.name.startswith(PREFIX) and digits.isdigit() else None


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, oldest first, unverified."""
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps)]


def save_checkpoint(
    root: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `root/step_<step>` with one safetensors file per entry of `files`, then drop all but the newest `keep`.

    Raises OSError in one line where it cannot be written; what was there before then stays as it was. An existing
    checkpoint of this step is left as it is.
    """
    final = root / f"{PREFIX}{step:08d}"
    if final.exists():
        return final
    work = root / f".tmp-{step:08d}-{os.getpid()}"
    try:
        entries: dict[str, dict[str, int]] = {}
        for name, tensors in files.items():
            entries |= write_entry(work, f"{name}.safetensors", tensors)
        commit(work, final, entries, dict(state) | {"step": step})
    except OSError as error:
        named = disk_error(error, root, step, sum(map(tensor_bytes, files.values())))  # before the removal
        shutil.rmtree(work, ignore_errors=True)
        raise named from error
    drop_old(root, keep)
    return final


def write_entry(
    work: Path, name: str, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None = None
) -> dict[str, dict[str, int]]:
    """Write one file of a checkpoint; returns its entry for the manifest."""
    path = work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    crc = write_tensors(path, tensors, offsets)
    return {name: {"bytes": path.stat().st_size, "crc32": crc}}


def commit(work: Path, final: Path, entries: Mapping[str, Mapping[str, int]], state: Mapping[str, Any]) -> None:
    """Give a folder with all its tensors state and manifest, and the name under which it counts."""
    crc = write_json(work / STATE, state)
    entries = {**entries, STATE: {"bytes": (work / STATE).stat().st_size, "crc32": crc}}
    write_json(work / MANIFEST, {"format": 1, "step": state["step"], "files": entries})
    for folder in {(work / name).parent for name in entries} | {work}:
        sync_folder(folder)
    work.rename(final)
    sync_folder(final.parent)


def drop_old(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and the last good one where all of those had diverged."""
    saved = list_checkpoints(root)
    old = saved[:-keep]
    if old and all(map(_diverged, saved[-keep:])):
        good = next((path for path in reversed(old) if not _diverged(path)), None)
        old = [path for path in old if path != good]
    for path in old:
        renamed = path.with_name(f".tmp-old-{path.name}")  # a half-deleted folder is never a candidate
        with contextlib.suppress(OSError):
            path.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def _diverged(path: Path) -> bool:
    try:
        return bool(json.loads((path / STATE).read_bytes()).get("diverged"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def disk_error(error: OSError, root: Path, step: int, need: int) -> OSError:
    """The error of a checkpoint of `need` bytes that could not be written, in one line that says what is left."""
    last = list_checkpoints(root)
    kept = f"the checkpoint {last[-1].name} is intact" if last else "there is no earlier checkpoint"
    if error.errno in FULL:
        disk = os.statvfs(root)
        left = f"the disk has {mib(disk.f_bavail * disk.f_frsize)} free ({os.strerror(error.errno)}): free some space"
        if disk.f_files and not disk.f_favail:
            left = "the file system has no inodes left: remove some files"
        text = f"no room for the checkpoint of step {step} in {root}: it takes {mib(need)}, {left}; {kept}"
    else:
        text = f"cannot write the checkpoint of step {step} in {root}: {error.strerror or error}; {kept}"
    return WriteError(error.errno, text)


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        DamagedCheckpoint: what the manifest says does not hold.
        OSError: a file is there and cannot be read now, which says nothing about the checkpoint.
    """
    with _readable(path):
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            files, step = dict(manifest["files"]), int(manifest["step"])
            entries = {name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in files.items()}
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{MANIFEST} is missing") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DamagedCheckpoint(f"{MANIFEST} is unreadable ({type(error).__name__})") from None
        if step != step_of(path) or STATE not in entries:
            raise DamagedCheckpoint(f"{MANIFEST} does not describe this folder")
        if outside := [name for name in entries if ".." in Path(name).parts or Path(name).is_absolute()]:
            raise DamagedCheckpoint(f"{MANIFEST} names {outside[0]}, which lies outside of the checkpoint")
        for name, (size, crc) in entries.items():
            try:
                actual = (path / name).stat().st_size
                if actual != size:
                    raise DamagedCheckpoint(f"{name} has {actual} bytes instead of {size}")
                if file_crc32(path / name) != crc:
                    raise DamagedCheckpoint(f"{name} does not match its crc32")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise DamagedCheckpoint(f"{name}: {error.strerror or error}") from None
        return read_verified(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the checkpoint in the error of a file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot read the checkpoint {path} now ({error.strerror or error}); nothing was changed: mend what keeps "
            "it from being read and repeat the command",
        ) from error


def read_verified(path: Path) -> Checkpoint:
    """A checkpoint that was verified already, by this process or by rank 0."""
    with understood(path):
        state = dict(json.loads((path / STATE).read_text()))
    return Checkpoint(path, int(path.name.removeprefix(PREFIX)), state)


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Name the state of a checkpoint that holds something else than this program writes."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{path / STATE} is no state of a run ({reason}); continue from another checkpoint with --resume-from, or "
            "start anew with --fresh"
        ) from error


def check_state(found: Checkpoint) -> None:
    """ValueError where the state lacks what a run is continued with."""
    kinds = {"total_steps": int, "skipped": int, "identity": dict, "interval": dict, "scaler": dict, "metrics": dict}
    with understood(found.path):
        if wrong := [name for name, kind in kinds.items() if not isinstance(found.state[name], kind)]:
            raise TypeError(f"{wrong[0]} is {found.state[wrong[0]]!r}")


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones that do not, each with the reason."""
    rejected: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(root)):
        try:
            return verify(path), rejected
        except DamagedCheckpoint as reason:
            rejected.append((path, str(reason)))
    return None, rejected


def set_aside(path: Path, reason: str = "damaged") -> Path:
    """Rename a checkpoint to `<reason>-<name>`, so that its step can be written again; nothing is deleted."""
    number, target = 1, path.with_name(f"{reason}-{path.name}")
    while target.exists():
        number, target = number + 1, path.with_name(f"{reason}-{path.name}-{number}")
    return path.rename(target)


def remove_leftovers(root: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def require_space(root: Path, checkpoint_bytes: int, keep: int) -> None:
    """OSError, with the numbers, where the disk cannot hold `keep` checkpoints and the one being written."""
    missing = max(keep + 1 - len(list_checkpoints(root)), 1)
    need, free = missing * checkpoint_bytes, shutil.disk_usage(root).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{root}: the run needs {mib(need)} for {missing} checkpoints of {mib(checkpoint_bytes)}, the disk has "
            f"{mib(free)} free; free some space or choose another --output-dir",
        )


def compare(saved: Mapping[str, tuple[int, ...]], targets: Mapping[str, Tensor], what: str) -> None:
    """ValueError, with a name, where saved names and shapes are not those of the live tensors."""
    for name, shape in saved.items():
        target = targets.get(name)
        if target is None:
            raise ValueError(f"{what} of the checkpoint holds {name}, which the model lacks")
        if tuple(target.shape) != tuple(shape):
            raise ValueError(f"{what}: {name} has shape {tuple(shape)}, the model {tuple(target.shape)}")
    if missing := sorted(set(targets) - set(saved)):
        raise ValueError(f"{what} of the checkpoint lacks {len(missing)} tensors, e.g. {missing[0]}")


def part_of(tensor: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Of a tensor that FSDP2 split, this rank's part and where it begins; of any other, all of it."""
    if not hasattr(tensor, "to_local"):
        return tensor, (0,) * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return tensor.to_local(), tuple(chunk.offsets)


def copy_into(targets: Mapping[str, Tensor], source: Iterator[tuple[str, Tensor]], what: str) -> None:
    """Copy saved tensors into live ones, one at a time; names and shapes have to be the same."""
    seen: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        for name, saved in source:
            if name in targets:
                compare({name: tuple(saved.shape)}, {name: targets[name]}, what)
                local, offsets = part_of(targets[name])
                local.copy_(saved[tuple(slice(o, o + n) for o, n in zip(offsets, local.shape, strict=True))])
            seen[name] = tuple(saved.shape)
    compare(seen, targets, what)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
