"""Read the tensors, and nothing else, from a file written by `torch.save`.

The published dVAE files are pickles of whole modules, which an ordinary unpickler would run code to rebuild. Here a
class of a module becomes an inert record, tensors are built by this file, and every other name is refused. Both
containers of `torch.save` are read: the zip file (torch >= 1.6) and the older stream.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_fast.tokenizers.base import TokenizerError

__all__ = ["read_tensors"]

_STREAM_MAGIC, _STREAM_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
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
# Names whose instances become inert records. None of these is imported.
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
    """Allocates `storages` of at most `room` bytes together; their contents come from elsewhere in the file."""

    def __init__(self, file: Any, room: int = 0) -> None:
        super().__init__(file)
        self.storages: dict[str, Tensor] = {}
        self._room = room

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if isinstance(allowed, FunctionType):
            return lambda *args: allowed(*args)  # a new function each time: attributes set on it affect nothing else
        if allowed is not None:
            return allowed
        if (module, name) in _INERT_NAMES or (f"{module}.".startswith(_INERT_PACKAGES) and "." not in name):
            return type(name, (_Record,), {"__module__": module})
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is neither a tensor nor a layer")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid and pid[0] == "module":  # streams carry the source of a class: not looked at
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("an unknown kind of reference")
        dtype, key, numel = pid[1].dtype, pid[2], pid[4]
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a malformed storage reference")
        if key not in self.storages:
            self._room -= numel * dtype.itemsize
            if self._room < 0:  # do not allocate what the file cannot hold
                raise pickle.UnpicklingError(f"storage {key} is larger than the file")
            self.storages[key] = torch.empty(numel, dtype=dtype)
        flat = self.storages[key]
        if flat.dtype != dtype or flat.numel() != numel:
            raise pickle.UnpicklingError(f"storage {key} has two types or sizes")
        if len(pid) > 5 and pid[5] is not None:  # in streams: (key of the view, offset, length)
            flat = flat.narrow(0, pid[5][1], pid[5][2])
        return flat


def _fill(storage: Tensor, data: bytes) -> None:
    if len(data) != storage.numel() * storage.dtype.itemsize:
        raise pickle.UnpicklingError("truncated storages")
    if data:
        storage.copy_(torch.frombuffer(bytearray(data), dtype=storage.dtype))


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):  # torch.save never compresses
            raise pickle.UnpicklingError("a compressed zip file")
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("a zip file without a data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("a file written on a big-endian machine")
        unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), len(data))
        loaded = unpickler.load()
        for key, storage in unpickler.storages.items():
            _fill(storage, archive.read(f"{root}data/{key}"))
        return loaded


def _read_stream(data: bytes) -> Any:
    with io.BytesIO(data) as file:
        if _TensorUnpickler(file).load() != _STREAM_MAGIC:
            raise pickle.UnpicklingError("not a file written by torch.save")
        if _TensorUnpickler(file).load() != _STREAM_PROTOCOL:
            raise pickle.UnpicklingError("an unknown version of torch.save")
        info = _TensorUnpickler(file).load()
        if isinstance(info, dict) and info.get("little_endian") is False:
            raise pickle.UnpicklingError("a file written on a big-endian machine")
        unpickler = _TensorUnpickler(file, len(data))
        loaded = unpickler.load()
        keys = _TensorUnpickler(file).load()
        if set(keys) != set(unpickler.storages):
            raise pickle.UnpicklingError("inconsistent storages")
        for key in keys:
            storage = unpickler.storages[key]
            if int.from_bytes(file.read(8), "little") != storage.numel():
                raise pickle.UnpicklingError("truncated or inconsistent storages")
            _fill(storage, file.read(storage.numel() * storage.dtype.itemsize))
        return loaded


def _collect(value: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Add parameters and buffers of an inert module, named as in its state dict, or the tensors of a dict."""
    groups: list[Any] = [value]
    children: dict[str, Any] = {}
    if isinstance(value, _Record):
        groups = [value.__dict__.get("_parameters"), value.__dict__.get("_buffers")]
        children = value.__dict__.get("_modules") or {}
    for group in groups:
        if isinstance(group, dict):
            tensors.update({f"{prefix}{name}": t for name, t in group.items() if isinstance(t, Tensor)})
    for name, child in children.items():
        _collect(child, f"{prefix}{name}.", tensors)


def read_tensors(path: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """Read the tensors of a `torch.save` file that holds a module or a state dict; nothing in it is executed.

    Args:
        path: the file. A state dict may lie under `weights`, `state_dict`, `model` or `module`.
        data: its bytes, where they have been read.

    Returns:
        name -> tensor, on the CPU, contiguous.

    Raises:
        TokenizerError: the file is anything else: text, truncated, a pickle that names other code.
    """
    data = path.read_bytes() if data is None else data
    _refuse_text(path, data[:4096])
    try:
        loaded = _read_zip(data) if data.startswith(b"PK") else _read_stream(data)
    except Exception as error:  # a broken or hostile pickle can fail in any way; to the reader all mean the same
        reason = str(error).replace("\n", " ") or "it is truncated"
        raise TokenizerError(f"{path} is refused: {reason}. Fetch the published file again.") from error
    if isinstance(loaded, dict):
        nested = [loaded.get(key) for key in ("weights", "state_dict", "model", "module")]
        loaded = next((value for value in nested if isinstance(value, (dict, _Record))), loaded)
    tensors: dict[str, Tensor] = {}
    _collect(loaded, "", tensors)
    if not tensors:
        raise TokenizerError(f"{path} holds no tensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > 2 * len(data):  # thousands of views of one storage; a shared weight may come twice
        raise TokenizerError(
            f"{path} is refused: its tensors take {size >> 20:,} MiB, the file {len(data) >> 20:,}. Fetch the "
            "published file again."
        )
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
