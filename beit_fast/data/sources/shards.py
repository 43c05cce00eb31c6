"""Images in tar shards, as webdataset writes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from beit_fast.data.sources.files import Files, LocalFiles, RemoteFiles
from beit_fast.data.sources.source import Names, default_cache_dir, is_image, readable_suffixes


class TarSource:
    """Images in (uncompressed) tar shards as webdataset writes them: `key.jpg` and, optionally, `key.cls` beside it.

    Args:
        shards: paths, or URLs that fsspec knows. A remote shard is read once as a whole to list its members; the list
            is kept in the cache folder. Afterwards each image is one request for a range of bytes.
    """

    def __init__(self, shards: Sequence[Path | str]) -> None:
        self.shards = list(shards)
        remote = any("://" in str(shard) for shard in self.shards)
        self._files: Files = RemoteFiles([str(s) for s in self.shards]) if remote else LocalFiles(self.shards)
        listing = _listed_remotely if remote else _index_shard
        # Walking the headers waits on the disk or the network much more than on the processor.
        with ThreadPoolExecutor(min(8, len(self.shards))) as pool:
            indices = list(pool.map(lambda number: listing(self._files, number), range(len(self.shards))))
        members = [(number, *member) for number, index in enumerate(indices) for member in index]
        if not members:
            raise ValueError(f"no images in {self.shards[0]} (of {len(self.shards)} shards): {readable_suffixes()}")
        self._names = Names(member[1] for member in members)
        self._where = np.array([(member[0], member[2], member[3]) for member in members], np.int64)
        labels = [member[4] for member in members]
        known = [label for label in labels if label is not None]
        self._labels = np.array(known, np.int32) if len(known) == len(labels) else None

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(value) for value in self._where[index])
        return self._files.read(shard, offset, size)

    def name(self, index: int) -> str:
        return f"{self.shards[int(self._where[index, 0])]}:{self._names[index]}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


Member = tuple[str, int, int, int | None]
"""Name, offset, size and label of an image."""


def _index_shard(files: Files, number: int) -> list[Member]:
    """The images of one shard."""
    path = files.names[number]
    images: list[tuple[str, int, int]] = []
    classes: dict[str, int] = {}

    def read(offset: int, size: int) -> bytes:
        return files.read(number, offset, size)

    for name, offset, size in _tar_members(read, files.size(number), path):
        folder, base = os.path.split(name)
        key = os.path.join(folder, base.split(".", 1)[0])
        if base.endswith(".cls") and not base.startswith("."):
            text = read(offset, size).strip()
            if not text.isdigit():
                raise ValueError(f"{path}:{name}: a class must be a number, found {text[:20]!r}")
            classes[key] = int(text)
        elif is_image(base):
            images.append((name, offset, size))
    return [
        (name, offset, size, classes.get(os.path.join(os.path.dirname(name), os.path.basename(name).split(".", 1)[0])))
        for name, offset, size in images
    ]


class _Blocks:
    """A remote file as `Files` of its own, read in blocks: the next header mostly lies in the last block."""

    BYTES = 4 << 20

    def __init__(self, files: Files, number: int) -> None:
        self.names, self._files, self._number = [files.names[number]], files, number
        self._start, self._block = 0, b""

    def size(self, number: int) -> int:
        return self._files.size(self._number)

    def version(self, number: int) -> str:
        return self._files.version(self._number)

    def read(self, number: int, offset: int, size: int) -> bytes:
        if not self._start <= offset <= offset + size <= self._start + len(self._block):
            self._start, self._block = offset, self._files.read(self._number, offset, max(size, self.BYTES))
        return self._block[offset - self._start : offset - self._start + size]


def _listed_remotely(files: Files, number: int) -> list[Member]:
    """The images of a remote shard, from the list in the cache folder where the shard is still the same."""
    key = hashlib.sha256(f"{files.names[number]}\0{files.version(number)}".encode()).hexdigest()[:32]
    path = default_cache_dir() / "shards" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return [(str(name), int(at), int(size), label) for name, at, size, label in json.loads(path.read_text())]
    members = _index_shard(_Blocks(files, number), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(members))
    os.replace(partial, path)
    return members


def _tar_members(read: Callable[[int, int], bytes], end: int, path: str) -> Iterator[tuple[str, int, int]]:
    """Regular files of a POSIX or GNU tar. `tarfile` does the same at a tenth of the speed."""
    offset, long_name, long_size = 0, None, None
    while offset < end:
        head = read(offset, 512)
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
            long_name = os.fsdecode(read(data, size).rstrip(b"\0"))
        elif kind == b"x":
            records = _pax_records(read(data, size))
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
