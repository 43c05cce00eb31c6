"""Where images come from: folders, webdataset tar shards, arrays.

A source is a fixed, ordered list of encoded images: `read(i)` gives the bytes of image i, whatever thread or process
asks, and nothing about it is random. The order of an epoch, crops and masks belong to `sampling`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


@runtime_checkable
class ImageSource(Protocol):
    """A fixed sequence of encoded images. Implementations may be used from several threads at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image; OSError where it cannot be read."""

    def name(self, index: int) -> str:
        """How a person finds the image: a path, or `shard.tar:member`."""

    def label(self, index: int) -> int | None:
        """The class, or None where the source has none."""


class _Names:
    """Many strings in one block of memory: 14 million paths are 0.6 GB here and 1.6 GB as a list of `str`."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._text[start : int(self._ends[index])])


class FolderSource:
    """Image files under a root. `names` are paths relative to it, `labels` one class per file or None."""

    def __init__(self, root: Path, names: Iterable[str], labels: NDArray[np.int32] | None = None) -> None:
        self.root = root
        self._names = _Names(names)
        self._labels = labels

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self._names[index]), "rb", buffering=0) as file:
            return file.read()

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._names[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


class TarSource:
    """Images in (uncompressed) tar shards as webdataset writes them: `key.jpg` and, optionally, `key.cls` beside it."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        # Walking the headers waits on the disk much more than on the processor.
        with ThreadPoolExecutor(min(8, len(self.shards))) as pool:
            indices = list(pool.map(_index_shard, self.shards))
        members = [(number, *member) for number, index in enumerate(indices) for member in index]
        if not members:
            raise ValueError(f"no images in {self.shards[0]} (of {len(self.shards)} shards): {_wanted()}")
        self._names = _Names(member[1] for member in members)
        self._where = np.array([(member[0], member[2], member[3]) for member in members], np.int64)
        labels = [member[4] for member in members]
        known = [label for label in labels if label is not None]
        self._labels = np.array(known, np.int32) if len(known) == len(labels) else None
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(value) for value in self._where[index])
        file = self._files.get(shard)
        if file is None:
            opened = os.open(self.shards[shard], os.O_RDONLY)
            file = self._files.setdefault(shard, opened)
            if file != opened:  # another thread was faster
                os.close(opened)
        return os.pread(file, size, offset)

    def name(self, index: int) -> str:
        return f"{self.shards[int(self._where[index, 0])]}:{self._names[index]}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


class ArraySource:
    """Images in memory: uint8 (n, H, W, 3) or (n, H, W), or a list of such arrays of different sizes."""

    def __init__(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], labels: Sequence[int] | None = None):
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: {len(labels)} for {len(images)} images")
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes:
        """A binary PPM or PGM: a header before the pixels, so that arrays take the same way as files."""
        image = np.asarray(self._images[index])
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"images[{index}]: expected uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
        kind = "P5" if image.ndim == 2 else "P6"
        return f"{kind}\n{image.shape[1]} {image.shape[0]}\n255\n".encode() + image.tobytes()

    def name(self, index: int) -> str:
        return f"array:{index}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


def open_source(path: str | os.PathLike[str]) -> ImageSource:
    """Open what `path` names.

    - a folder with images at any depth. Where every image lies below a first-level folder, those folders, sorted by
      name, are the classes;
    - a folder with `.tar` shards, one shard, or a pattern of them: `/data/train-{0000..0146}.tar`, `/data/*.tar`.

    Files whose name starts with a dot are left out. ValueError, in one line, where there is nothing to train on.
    """
    text = os.path.expanduser(os.fspath(path))
    if "://" in text:
        raise ValueError(f"{text}: only local paths can be read; mount or copy the data first")
    if not os.path.isdir(text) and (text.endswith(".tar") or any(sign in text for sign in "*?[{")):
        shards = [Path(name) for pattern in _expand_braces(text) for name in sorted(glob.glob(pattern)) or [pattern]]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise ValueError(f"no such file: {missing[0]} ({len(missing)} of the {len(shards)} shards of {text})")
        return TarSource(shards)
    root = Path(text)
    if not root.exists():
        raise ValueError(f"no such folder: {root}{_nearest(root)}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the images, or .tar shards")
    try:
        shards = sorted(entry for entry in root.iterdir() if entry.suffix == ".tar" and not entry.name.startswith("."))
        return TarSource(shards) if shards else _open_folder(root)
    except PermissionError as error:
        raise ValueError(f"cannot read {error.filename or root}: permission denied") from error


def fingerprint(source: ImageSource) -> str:
    """Sixteen hexadecimal digits of the names in their order: two runs see the same data only where these agree."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in range(len(source)):
        name = os.path.split(source.name(index))
        digest.update(os.fsencode(os.path.join(os.path.basename(name[0]), name[1])) + b"\0")
    return digest.hexdigest()[:16]


def _wanted() -> str:
    return f"looking for {', '.join(IMAGE_SUFFIXES)}"


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _open_folder(root: Path) -> FolderSource:
    names: list[str] = []
    others: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise error

    entered = {os.path.realpath(root)}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:
            target = os.path.realpath(os.path.join(folder, name))
            if target in entered or str(root.resolve()).startswith(target + os.sep):  # a link in a circle
                subfolders.remove(name)
            entered.add(target)
        relative = os.path.relpath(folder, root)
        for name in sorted(files):
            if _is_image(name):
                names.append(name if relative == "." else os.path.join(relative, name))
            else:
                others[os.path.splitext(name)[1] or name] += 1
    if not names:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        raise ValueError(f"no images in {root} ({_wanted()}; found {found or 'nothing'})")
    names.sort(key=lambda name: tuple(name.split(os.sep)))
    tops = [name.split(os.sep, 1)[0] if os.sep in name else None for name in names]
    if None in tops:
        return FolderSource(root, names)
    numbers = {top: number for number, top in enumerate(sorted({top for top in tops if top is not None}))}
    return FolderSource(root, names, np.array([numbers[top] for top in tops if top is not None], np.int32))


def _nearest(path: Path) -> str:
    """A hint: the last part of a wrong path that exists."""
    parent = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    return "" if parent is None or parent == path.absolute().parent else f" ({parent} exists)"


def _expand_braces(text: str) -> list[str]:
    """`a{000..012}b{x,y}` as the shell expands it."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices: list[list[str]] = []
    for number, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if number % 2 else None
        if span:
            width = len(span[1]) if span[1].startswith("0") else 0
            choices.append([f"{value:0{width}d}" for value in range(int(span[1]), int(span[2]) + 1)])
        else:
            choices.append(part.split(",") if number % 2 else [part])
    return ["".join(choice) for choice in product(*choices)]


def _index_shard(path: Path) -> list[tuple[str, int, int, int | None]]:
    """(name, offset, size, label) of the images of one shard."""
    images: list[tuple[str, int, int]] = []
    classes: dict[str, int] = {}
    with open(path, "rb") as file:
        for name, offset, size in _tar_members(file.fileno(), path):
            folder, base = os.path.split(name)
            key = os.path.join(folder, base.split(".", 1)[0])
            if base.endswith(".cls") and not base.startswith("."):
                text = os.pread(file.fileno(), size, offset).strip()
                if not text.isdigit():
                    raise ValueError(f"{path}:{name}: a class must be a number, found {text[:20]!r}")
                classes[key] = int(text)
            elif _is_image(base):
                images.append((name, offset, size))
    return [
        (name, offset, size, classes.get(os.path.join(os.path.dirname(name), os.path.basename(name).split(".", 1)[0])))
        for name, offset, size in images
    ]


def _tar_members(file: int, path: Path) -> Iterator[tuple[str, int, int]]:
    """Regular files of a POSIX or GNU tar. `tarfile` does the same at a tenth of the speed."""
    end = os.fstat(file).st_size
    offset, long_name, long_size = 0, None, None
    while offset < end:
        head = os.pread(file, 512, offset)
        if not head.strip(b"\0"):
            return
        if len(head) < 512 or head[257:262] != b"ustar":
            raise ValueError(f"{path}: not an (uncompressed) tar archive, or damaged, at byte {offset} of {end}")
        size = int.from_bytes(head[125:136], "big") if head[124] & 0x80 else int(head[124:136].strip(b"\0 ") or b"0", 8)
        kind = head[156:157]
        data = offset + 512
        if kind in b"0\0":
            size = size if long_size is None else long_size
        if data + size > end:
            raise ValueError(f"{path}: cut off at byte {end} (a member needs {data + size}); fetch the shard again")
        if kind == b"L":
            long_name = os.fsdecode(os.pread(file, size, data).rstrip(b"\0"))
        elif kind == b"x":
            records = _pax_records(os.pread(file, size, data))
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if "size" in records else long_size
        elif kind in b"0\0":
            name, prefix = head[:100].rstrip(b"\0"), head[345:500].rstrip(b"\0")
            if long_name is None:
                posix = head[262:263] == b"\0"
                long_name = os.fsdecode(prefix + b"/" + name if posix and prefix else name)
            yield long_name, data, size
            long_name, long_size = None, None
        offset = data + (size + 511) // 512 * 512


def _pax_records(data: bytes) -> dict[str, str]:
    """Records `length key=value\\n` of a pax extended header."""
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
    return records
