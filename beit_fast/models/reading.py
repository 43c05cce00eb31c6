"""Weights out of files that others wrote, without running anything that such a file may hold."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_AVERAGED = ("state_dict_ema", "model_ema")  # timm and the official code
_MOST_NAMES = 1000  # in one file
_CONTAINERS = ("model", "module", "state_dict")  # the official code, DeepSpeed, mmsegmentation and timm


class CheckpointError(ValueError):
    """A file that cannot be read, or does not fit the model; one line says why and what to do."""


@dataclass
class Checkpoint:
    """What a file of weights holds."""

    tensors: dict[str, Tensor]
    """The state dict, on CPU."""
    taken: str = ""
    """The name of the set of weights that was taken, where the file has averaged ones and others."""
    skipped: list[str] = field(default_factory=list)
    """Classes and functions named in the file beside the tensors; nothing of them was imported or executed."""


def read_state_dict(path: str | Path, *, sha256: str | None = None, ema: bool = True) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, on CPU; arguments and errors as of `read_checkpoint`."""
    return read_checkpoint(path, sha256=sha256, ema=ema).tensors


def read_checkpoint(path: str | Path, *, sha256: str | None = None, ema: bool = True) -> Checkpoint:
    """Reads the named tensors of a checkpoint and skips everything else in it, unexecuted.

    Args:
        path: a `.safetensors` file; a file of `torch.save` holding a state dict, by itself or under `model`, `module`
            (DeepSpeed) or `state_dict` (mmsegmentation, timm), with anything else in it; or a folder of either.
        sha256: of the file, in hexadecimal, where it is known; only then is forgery out of question.
        ema: take the averaged weights (`state_dict_ema`, `model_ema`) where the file has some, as timm does.

    Raises:
        CheckpointError: the file is absent, damaged (as far as its own checksums tell), or names functions of the
            operating system. Nothing in it is executed.
    """
    file = _file_at(Path(path))
    if sha256 is not None:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != sha256.lower():
            raise CheckpointError(f"{file}: sha256 is {digest}, expected {sha256}: download it again")
    with file.open("rb") as stream:
        start = stream.read(512)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(file)
        checkpoint = _unpickled(file, mmap=True, ema=ema)
    elif start[:1] == b"\x80":
        checkpoint = _unpickled(file, mmap=False, ema=ema)
    elif start[8:9] == b"{":
        checkpoint = Checkpoint(_safetensors(file))
    else:
        raise CheckpointError(f"{file}: {_description(start)}, not a checkpoint of safetensors or torch.save")
    for name, tensor in checkpoint.tensors.items():
        _check_layout(file, name, tensor)
    return checkpoint


def _file_at(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            _check_manifest(path, name)
            return path / name
    raise CheckpointError(f"{path}: the folder holds neither {' nor '.join(WEIGHT_FILES)}; name the file itself")


def _check_manifest(folder: Path, name: str) -> None:
    """A checkpoint of this library's training states size and crc32 of each of its files."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    try:
        expected = json.loads(manifest.read_text())["files"][name]
        expected = expected["bytes"], expected["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{manifest}: says nothing that can be read of {name}") from error
    crc = 0
    with (folder / name).open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    if ((folder / name).stat().st_size, crc) != expected:
        raise CheckpointError(f"{folder / name}: damaged, it differs from what {manifest.name} says: take another one")


def _description(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.lstrip()[:1] == b"<":
        return "a web page or an error message of the server it came from"
    return f"a file that begins with {start[:8]!r}"


def _check_archive(file: Path) -> None:
    """torch.load itself notices no flipped bit; the archive's checksums do."""
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{file}: {entry.filename!r} is compressed, which torch.save never does")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: cut off or damaged ({_first_line(error)}): get it again") from error
    if damaged is not None:
        raise CheckpointError(f"{file}: damaged, the checksum of {damaged!r} does not hold: get it again")


class _Skipped:
    """Stands for an object of a class or function that is not loaded: takes any arguments and any state."""

    def __new__(cls, *args: object, **kwargs: object) -> _Skipped:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(number: int, container: type | None) -> type:
    """A class for one name of a pickle; what is made of it is an empty `container`, where the pickle fills it."""
    members = {"__new__": lambda cls, *args, **kwargs: container()} if container else {}
    return type(f"_Skipped_{number}", (_Skipped,), members)


def _unpickled(file: Path, mmap: bool, ema: bool) -> Checkpoint:
    """Reads a file of `torch.save` with torch's restricted unpickler, which imports and calls nothing it was not given.

    It is given a stand-in for every name that it stops at; pickles fill some of these as lists or dictionaries.
    """
    stand_ins: dict[str, type] = {"argparse.Namespace": argparse.Namespace}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except Exception as error:
            text = str(error)
            foreign = re.search(r"Unsupported global: GLOBAL ([\w.]+) ", text)
            filled = re.search(r"Can only (append|extend|SETITEM)", text)
            name = foreign[1] if foreign else ""
            name = name if "." in name or not name else f"builtins.{name}"
            if foreign and name not in stand_ins and len(stand_ins) < _MOST_NAMES:
                stand_ins[name] = _stand_in(len(stand_ins), None)
                continue
            culprit = re.search(r"got <class '[\w.]*_Skipped_(\d+)'>", text) if filled else None
            if filled and culprit:
                name = list(stand_ins)[int(culprit[1])]
                stand_ins[name] = _stand_in(0, OrderedDict if filled[1] == "SETITEM" else list)
                continue
            blocked = re.search(r"GLOBAL ([\w.]+)", text)
            if blocked:
                raise CheckpointError(
                    f"{file}: holds an object of {blocked[1]}, which weights have no need of; nothing was executed. "
                    "If you trust it, save its state dict alone with the library that wrote it"
                ) from error
            cause = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
            reason = cause[1][:200] if cause else _first_line(error)
            raise CheckpointError(f"{file}: damaged, or no file of torch.save ({reason})") from error
    checkpoint = _tensors_of(loaded, file, ema)
    checkpoint.skipped = [name for name in stand_ins if name != "argparse.Namespace"]
    return checkpoint


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:
        raise CheckpointError(f"{file}: damaged, or no safetensors file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _tensors_of(loaded: Any, file: Path, ema: bool) -> Checkpoint:
    """The state dict in what a file holds: its tensors, wherever the usual containers put them."""
    opened: set[int] = set()
    taken = ""
    while isinstance(loaded, Mapping) and id(loaded) not in opened:  # one may hold itself
        opened.add(id(loaded))
        averaged = [name for name in _AVERAGED if isinstance(loaded.get(name), Mapping) and loaded[name]]
        plain = [name for name in _CONTAINERS if isinstance(loaded.get(name), Mapping)]
        names = averaged + plain if ema else plain + averaged
        if not names:
            break
        if averaged and plain:
            taken = f"{names[0]!r}, {'averaged' if ema else 'not averaged'} weights (ema={not ema} takes "
            taken += f"{(plain if ema else averaged)[0]!r})"
        loaded = loaded[names[0]]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file}: holds a {type(loaded).__name__}, not a state dict")
    tensors = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        names = [str(k) for k in list(loaded)[:5]] or ["nothing"]
        raise CheckpointError(f"{file}: holds no named tensors (it holds {', '.join(names)})")
    return Checkpoint(tensors, taken)


def _check_layout(file: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "nested" if tensor.is_nested else f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
        raise CheckpointError(f"{file}: {name!r} is not a plain tensor ({kind})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: {name!r} claims shape {tuple(tensor.shape)}, more than the file holds")
