"""Images in tar shards, as webdataset writes them: `key.jpg` and, optionally, `key.cls` beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beit_fast.data.sources.contents import IMAGE_SUFFIXES, Contents, readable_suffixes
from beit_fast.data.sources.files import Files, LocalFiles, RemoteFiles
from beit_fast.data.sources.source import Names, arrays_to_skip, check_size, default_cache_dir, is_image, suffix_kind
from beit_fast.data.sources.tar import Member, members_of

_LABEL_BYTES = 32


class TarSource:
    """Images in (uncompressed) tar shards, read in place.

    The key of an image and of its class is the name up to `.jpg` or `.cls`; webdataset's ends at the first dot, and
    where that groups otherwise `contents` says so.

    Args:
        shards: paths, or URLs that fsspec knows. A remote shard is read once as a whole to list its members; the list
            is kept in the cache folder. Afterwards each image is one request for a range of bytes.

    Raises:
        ValueError: a shard is damaged, or bears two classes for one image; in one line that names it.
    """

    def __init__(self, shards: Sequence[Path | str]) -> None:
        self.shards = list(shards)
        remote = any("://" in str(shard) for shard in self.shards)
        self._files: Files = RemoteFiles([str(s) for s in self.shards]) if remote else LocalFiles(self.shards)
        listing = _listed_remotely if remote else _index_shard
        # Walking the headers waits on the disk or the network much more than on the processor.
        with ThreadPoolExecutor(min(8, len(self.shards))) as pool:
            indices = list(pool.map(lambda number: listing(self._files, number), range(len(self.shards))))
        first = str(self.shards[0])
        self.contents = Contents(first if len(self.shards) == 1 else os.path.dirname(first), "tar shards")
        for kind, name in (entry for index in indices for entry in index.skipped):
            self.contents.skip(kind, name)
        images = [(number, *image) for number, index in enumerate(indices) for image in index.images]
        skipped = arrays_to_skip([image[1] for image in images])
        for place in sorted(skipped):
            number, name, *_ = images[place]
            self.contents.skip(suffix_kind(name), f"{os.path.basename(self.shards[number])}:{name}")
        images = [image for place, image in enumerate(images) if place not in skipped]
        if not images:
            many = f" (of {len(self.shards)} shards)" if len(self.shards) > 1 else ""
            found = self.contents.skipped_counts()
            raise ValueError(f"no images in {first}{many} ({readable_suffixes()}; found {found})")
        self._names = Names(name for _, name, _, _, _ in images)
        self._where = np.array([(number, offset, size) for number, _, offset, size, _ in images], np.int64)
        self._labels = np.array([label for *_, label in images], np.int64)
        self.contents.images, self.contents.shards = len(images), len(self.shards)
        self._note_labels(int((self._labels >= 0).sum()))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(value) for value in self._where[index])
        check_size(size)
        return self._files.read(shard, offset, size)

    def name(self, index: int) -> str:
        return f"{self.shards[int(self._where[index, 0])]}:{self._names[index]}"

    def label(self, index: int) -> int | None:
        return None if self._labels[index] < 0 else int(self._labels[index])

    def _note_labels(self, labelled: int) -> None:
        count = len(self)
        if 0 < labelled < count:
            self.contents.notes.append(f"{count - labelled:,} of {count:,} images have no .cls entry")
        dotted = [name for name in map(self._names.__getitem__, range(count)) if "." in os.path.basename(_key(name))]
        if dotted and labelled:
            self.contents.notes.append(
                f"{len(dotted):,} names have a dot before their suffix, e.g. {dotted[0]}: image and class belong "
                "together where the names up to the suffix agree; webdataset would compare them up to the first dot"
            )


def _key(name: str) -> str:
    """The name of an image or class entry without its suffix."""
    lower = name.lower()
    return name[: -len(next(suffix for suffix in (".cls", *IMAGE_SUFFIXES) if lower.endswith(suffix)))]


class _Index(NamedTuple):
    """What one shard holds."""

    images: list[tuple[str, int, int, int]]
    """Name, offset, size and class of each; -1 where it has no class."""
    skipped: list[tuple[str, str]]
    """Kind and name of each member that is left out."""


def _index_shard(files: Files, number: int) -> _Index:
    path = files.names[number]
    members, skipped = members_of(lambda offset, size: files.read(number, offset, size), files.size(number), path)
    images: list[Member] = []
    classes: dict[str, tuple[str, int]] = {}
    for member in members:
        base = os.path.basename(member.name)
        if is_image(base):
            images.append(member)
        elif base.lower().endswith(".cls") and not base.startswith("."):
            text = files.read(number, member.offset, min(member.size, _LABEL_BYTES)).strip()
            if not text.isdigit() or member.size > _LABEL_BYTES:
                raise ValueError(f"{path}:{member.name}: a class must be a number, found {text[:20]!r}")
            key = _key(member.name)
            if key in classes:
                raise ValueError(f"{path}: two classes for {key}: {classes[key][0]} and {member.name}")
            classes[key] = member.name, int(text)
        else:
            skipped.append((suffix_kind(base), f"{os.path.basename(path)}:{member.name}"))
    return _Index([(*image, classes.get(_key(image.name), ("", -1))[1]) for image in images], skipped)


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


def _listed_remotely(files: Files, number: int) -> _Index:
    """The images of a remote shard, from the list in the cache folder where the shard is still the same."""
    key = hashlib.sha256(f"{files.names[number]}\0{files.version(number)}".encode()).hexdigest()[:32]
    path = default_cache_dir() / "shards-3" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        images, skipped = json.loads(path.read_text())
        return _Index([tuple(image) for image in images], [tuple(entry) for entry in skipped])
    index = _index_shard(_Blocks(files, number), 0)
    with contextlib.suppress(OSError):  # without it the shard is only listed again
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(index))
        os.replace(partial, path)
    return index
