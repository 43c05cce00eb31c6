"""Read the tensors, and nothing else, out of a file written by `torch.save`.

The published dVAE files are pickles of whole modules. Unpickled the ordinary way, they run whatever code they name and
need the packages their classes came from. Here classes of modules become inert records, tensors are built by our own
code, and every other name is refused before anything happens. Both containers of `torch.save` are read: the zip file
(torch >= 1.6) and the older stream.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_fast.tokenizers.base import TokenizerError

__all__ = ["read_tensors"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Names whose instances are kept as inert records. None of these is imported.
_INERT_PACKAGES = ("torch.nn.", "dall_e.")
_INERT_NAMES = {("torch", "device"), ("torch", "Size"), ("argparse", "Namespace")}


class _Record:
    """Stands for an object of a class that is not loaded: keeps its attributes, ignores its arguments."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _StorageType(NamedTuple):  # immutable: a pickle may try to set attributes on whatever it is given
    dtype: torch.dtype


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor with a malformed shape")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if torch.Size(size).numel() > storage.numel() or (torch.Size(size).numel() and last >= storage.numel()):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    return data


_ALLOWED: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
_ALLOWED |= {("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()}


class _TensorUnpickler(pickle.Unpickler):
    """`storage(key, dtype, numel)` supplies the flat tensor behind a storage key."""

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if isinstance(found, FunctionType):
            return lambda *args: found(*args)  # a new function each time, so that attributes set on it reach nobody
        if found is not None:
            return found
        if (module, name) in _INERT_NAMES or (f"{module}.".startswith(_INERT_PACKAGES) and "." not in name):
            return type(name, (_Record,), {"__module__": module})
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is neither a tensor nor a layer")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid and pid[0] == "module":  # old streams carry the class's source: not looked at
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("an unknown kind of reference")
        key, numel = pid[2], pid[4]
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a malformed storage reference")
        flat = self._storage(key, pid[1].dtype, numel)
        if len(pid) > 5 and pid[5] is not None:  # old streams: (key of the view, offset, length)
            flat = flat.narrow(0, pid[5][1], pid[5][2])
        return flat


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):  # torch.save never compresses
            raise pickle.UnpicklingError("a compressed zip file")
        pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("a zip file without a data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("a file written on a big-endian machine")
        storages: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            if key not in storages:
                data = bytearray(archive.read(f"{root}data/{key}"))
                if len(data) != numel * dtype.itemsize:
                    raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes, not {numel * dtype.itemsize}")
                storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if storages[key].dtype != dtype:
                raise pickle.UnpicklingError(f"storage {key} has two types")
            return storages[key]

        return _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _read_stream(path: Path) -> Any:
    size = path.stat().st_size
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        if key not in storages:
            if numel * dtype.itemsize > size:  # do not let a header allocate what the file cannot hold
                raise pickle.UnpicklingError(f"storage {key} is larger than the file")
            storages[key] = torch.empty(numel, dtype=dtype)
        if storages[key].dtype != dtype or storages[key].numel() != numel:
            raise pickle.UnpicklingError(f"storage {key} has two types or sizes")
        return storages[key]

    def no_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        raise pickle.UnpicklingError("a storage where none belongs")

    with path.open("rb") as file:
        if _TensorUnpickler(file, no_storage).load() != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("not a file written by torch.save")
        if _TensorUnpickler(file, no_storage).load() != _LEGACY_PROTOCOL:
            raise pickle.UnpicklingError("an unknown version of torch.save")
        info = _TensorUnpickler(file, no_storage).load()
        if isinstance(info, dict) and info.get("little_endian") is False:
            raise pickle.UnpicklingError("a file written on a big-endian machine")
        loaded = _TensorUnpickler(file, storage).load()
        for key in _TensorUnpickler(file, no_storage).load():
            header = file.read(8)
            flat = storages.get(key)
            if flat is None or len(header) != 8 or struct.unpack("<q", header)[0] != flat.numel():
                raise pickle.UnpicklingError("truncated or inconsistent storages")
            data = bytearray(file.read(flat.numel() * flat.dtype.itemsize))
            if len(data) != flat.numel() * flat.dtype.itemsize:
                raise pickle.UnpicklingError("truncated storages")
            if data:
                flat.copy_(torch.frombuffer(data, dtype=flat.dtype))
            storages[key] = flat
        return loaded


def _collect(value: Any, prefix: str, out: dict[str, Tensor]) -> None:
    """Parameters and buffers of an inert module, under the names `state_dict` gives them; or a dict of tensors."""
    if isinstance(value, _Record):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in (value.__dict__.get(kind) or {}).items():
                if isinstance(tensor, Tensor):
                    out[f"{prefix}{name}"] = tensor
        for name, child in (value.__dict__.get("_modules") or {}).items():
            _collect(child, f"{prefix}{name}.", out)
    elif isinstance(value, dict):
        for name, child in value.items():
            if isinstance(child, Tensor):
                out[f"{prefix}{name}"] = child


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor (on the CPU, contiguous) from a `torch.save` file that holds a module or a state dict.

    A state dict may lie under `weights`, `state_dict`, `model` or `module`. Nothing in the file is executed.
    Raises TokenizerError for anything else: text, truncated files, a pickle that names foreign code.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    _refuse_text(path, start)
    try:
        loaded = _read_zip(path) if start.startswith(b"PK") else _read_stream(path)
    except Exception as error:  # a broken or hostile pickle can fail in any way; to the reader all mean the same
        reason = str(error).replace("\n", " ") or "it is truncated"
        raise TokenizerError(f"{path} is refused: {reason}. Fetch the published file again.") from error
    if isinstance(loaded, dict):
        for key in ("weights", "state_dict", "model", "module"):
            if isinstance(loaded.get(key), (dict, _Record)):
                loaded = loaded[key]
                break
    tensors: dict[str, Tensor] = {}
    _collect(loaded, "", tensors)
    if not tensors:
        raise TokenizerError(f"{path} holds no tensors")
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _refuse_text(path: Path, start: bytes) -> None:
    lowered = start.lower()
    if b"saving to" in lowered or b"http request sent" in lowered or start.startswith(b"--20"):
        raise TokenizerError(
            f"{path} is a log of wget, not weights: `wget -o` names the log, `wget -O` names the file. Fetch it again."
        )
    if lowered.lstrip().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise TokenizerError(f"{path} is a web page, not weights: the server answered with an error. Fetch it again.")
    if not start:
        raise TokenizerError(f"{path} is empty. Fetch it again.")
