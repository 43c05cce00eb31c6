"""What a source of images is, which files are images, and what tells one set of images from another.

A source is a fixed, ordered list of encoded images: `read(i)` gives the bytes of image i, whatever thread or process
asks, and nothing about it is random. The order of an epoch, crops and masks belong to `sampling`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.sources.contents import ARRAY_SUFFIX, IMAGE_SUFFIXES, Contents

MAX_BYTES = 1 << 30
"""Larger files are refused: no image that is decoded is so large."""
HELPERS = frozenset(
    ("@eaDir", "#recycle", "#snapshot", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)
"""Folders that systems put between the data; like hidden ones they are skipped."""


class ImageSource(Protocol):
    """A fixed sequence of encoded images. Implementations may be used from several threads at once."""

    contents: Contents
    """What the source was made of."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image; OSError where it cannot be read."""

    def name(self, index: int) -> str:
        """How a person finds the image: a path, or `shard.tar:member`."""

    def label(self, index: int) -> int | None:
        """The class, or None where the source has none."""


class SourceUnavailable(RuntimeError):
    """A source as a whole cannot be reached: the run ends with this one line, no image is skipped for it."""


class Names:
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


def default_cache_dir() -> Path:
    """Give `$BEIT_FAST_CACHE`, or `beit_fast` in the user's cache folder.

    Raises:
        ValueError: neither is set, and there is no home folder.
    """
    if "BEIT_FAST_CACHE" in os.environ:
        return Path(os.environ["BEIT_FAST_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit_fast"
    except RuntimeError:
        raise ValueError("there is no home folder to keep the cache in; set BEIT_FAST_CACHE to a folder") from None


def first_level_classes(names: Sequence[str], separator: str) -> NDArray[np.int32] | None:
    """Number the first-level folders of `names` in sorted order; None where a name has no folder."""
    tops = [name.partition(separator)[0] for name in names if separator in name]
    if len(tops) < len(names):
        return None
    numbers = {top: number for number, top in enumerate(sorted(set(tops)))}
    return np.array([numbers[top] for top in tops], np.int32)


def is_image(name: str) -> bool:
    """Whether the name of a file says that it is an image."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def arrays_to_skip(names: Sequence[str]) -> set[int]:
    """Numbers of the arrays among `names` of images, where not all of them are arrays."""
    arrays = {number for number, name in enumerate(names) if name.lower().endswith(ARRAY_SUFFIX)}
    return arrays if len(arrays) < len(names) else set()


def suffix_kind(name: str) -> str:
    """What a file that is no image is counted as."""
    if name.startswith("."):
        return "hidden file"
    suffix = os.path.splitext(name)[1].lower()
    return f"suffix {suffix}" if suffix else "file without a suffix"


def check_size(size: int) -> None:
    """Refuse to read what is too large for an image, with an OSError."""
    if size > MAX_BYTES:
        raise OSError(f"{size / 2**20:,.0f} MiB; images have at most {MAX_BYTES // 2**20:,} MiB")


def is_helper(folder: str) -> bool:
    """Whether a folder of this name is hidden or made by a system."""
    return folder.startswith(".") or folder in HELPERS


def read_file(path: str) -> bytes:
    """Read a regular file; a pipe or device, which might never end, and a huge file are an OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, socket or device, not a file")
        check_size(state.st_size)
        parts = []
        while part := os.read(file, state.st_size + 1):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(file)


def fingerprint(source: ImageSource) -> str:
    """Sixteen hexadecimal digits of the names in their order: two runs see the same data only where these agree."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in range(len(source)):
        name = os.path.split(source.name(index))
        digest.update(os.fsencode(os.path.join(os.path.basename(name[0]), name[1])) + b"\0")
    return digest.hexdigest()[:16]
