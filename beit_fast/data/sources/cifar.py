"""CIFAR-100 as its authors distribute it (Krizhevsky, 2009): the binary version, and the pickles of the python version.

A pickle is a program. Here it is read by an unpickler that knows four names, none of which does anything: arrays are
rebuilt from their bytes, everything else is refused.
"""

from __future__ import annotations

import codecs
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIXELS = 3 * 32 * 32
NUM_CLASSES = 100
_BINARY = ("train.bin", "test.bin")
_PYTHON = ("train", "test")


def is_cifar100(folder: Path) -> bool:
    """Whether `folder` holds CIFAR-100, in either version."""
    binary = all((folder / name).is_file() for name in _BINARY)
    return binary or all((folder / name).is_file() for name in (*_PYTHON, "meta"))


def read_cifar100(folder: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Images uint8 (n, 32, 32, 3), fine labels int64 (n,) in [0, 100) and the 100 class names.

    Raises:
        ValueError: a file is damaged, in one line that names it.
    """
    if all((folder / name).is_file() for name in _BINARY):
        pixels, labels = _read_binary(folder / _BINARY[not train])
        listed = folder / "fine_label_names.txt"
        names = listed.read_text().split() if listed.is_file() else [str(number) for number in range(NUM_CLASSES)]
    else:
        path = folder / _PYTHON[not train]
        content = _load(path)
        pixels, labels = _array(content, "data", path), np.asarray(_list(content, "fine_labels", path))
        names = [str(name) for name in _list(_load(folder / "meta"), "fine_label_names", folder / "meta")]
        if pixels.ndim != 2 or pixels.shape[1] != PIXELS or len(labels) != len(pixels):
            raise ValueError(f"{path}: damaged, {pixels.shape} pixels for {len(labels)} labels; extract it again")
    if len(names) != NUM_CLASSES:
        raise ValueError(f"{folder}: {len(names)} class names, CIFAR-100 has {NUM_CLASSES}; extract it again")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < NUM_CLASSES:
        raise ValueError(f"{folder}: label {int(labels.max())} is outside [0, {NUM_CLASSES}); extract it again")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int64), tuple(names)


def _read_binary(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Records of a coarse label, a fine label and the pixels, one byte each."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    record = 2 + PIXELS
    if not len(data) or len(data) % record:
        raise ValueError(
            f"{path}: {len(data)} bytes are not whole records of {record}; damaged or not CIFAR-100, extract it again"
        )
    records = data.reshape(-1, record)
    return records[:, 2:], records[:, 1]


class _Pickled:
    """What a pickle builds an array from; keeps it, does nothing with it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    """How python 3 writes bytes into an old pickle."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return codecs.latin_1_encode(text)[0]


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Pickled,
    ("numpy._core.multiarray", "_reconstruct"): _Pickled,
    ("numpy", "ndarray"): _Pickled,
    ("numpy", "dtype"): _Pickled,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for persistent objects, which no CIFAR file does")


def _load(path: Path) -> dict[str, Any]:
    """The dictionary of a CIFAR pickle."""
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path}: cannot be read as a CIFAR-100 file: {error or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a CIFAR-100 file (holds a {type(content).__name__})")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _list(content: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{path}: has no list {key!r}; not a CIFAR-100 file")
    return value


def _array(content: dict[str, Any], key: str, path: Path) -> NDArray[np.uint8]:
    """The uint8 array under `key`, from the (version, shape, dtype, fortran, bytes) that numpy pickles."""
    pickled = content.get(key)
    try:
        _, shape, kind, fortran, data = pickled.state  # type: ignore[union-attr]
        code = kind.arguments[0]
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        if code not in ("u1", "uint8") or fortran:
            raise ValueError
        return np.frombuffer(raw, np.uint8).reshape(shape)
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ValueError(f"{path}: {key!r} is not an array of bytes; damaged or not CIFAR-100") from None
