"""Images in zip archives."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from beit_fast.data.sources.contents import Contents, readable_suffixes
from beit_fast.data.sources.files import LocalFiles
from beit_fast.data.sources.source import (
    Names,
    arrays_to_skip,
    check_size,
    first_level_classes,
    is_helper,
    is_image,
    suffix_kind,
)

_HEADER = struct.Struct("<4s5H3L2H")  # the local header in front of a member (APPNOTE.TXT, section 4.3.7)
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class ZipSource:
    """Images in zip archives, stored or deflated; where all lie in first-level folders, these are the classes.

    Members are read by their position in the file, without a lock, and compared with their checksum.

    Raises:
        ValueError: an archive is damaged or encrypted, or holds no image; the message names it.
    """

    def __init__(self, archives: Sequence[Path]) -> None:
        self.archives = list(archives)
        names: list[tuple[int, str]] = []
        rows: list[tuple[int, int, int, int, int, int]] = []
        self.contents = Contents(str(self.archives[0]), "zip archives")
        for number, path in enumerate(self.archives):
            for info in _members(path):
                base = info.filename.rsplit("/", 1)[-1]
                shown = f"{path.name}:{info.filename}"
                if any(is_helper(part) for part in info.filename.split("/")[:-1]):
                    self.contents.skip("file in a helper folder", shown)
                    continue
                if stat.S_ISLNK(info.external_attr >> 16) or not is_image(base):
                    self.contents.skip(suffix_kind(base) if not is_image(base) else "link", shown)
                    continue
                names.append((number, info.filename))
                rows.append(
                    (number, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                )
        skipped = arrays_to_skip([name for _, name in names])
        for number in sorted(skipped):
            archive, name = names[number]
            self.contents.skip(suffix_kind(name), f"{self.archives[archive].name}:{name}")
        names = [name for number, name in enumerate(names) if number not in skipped]
        rows = [row for number, row in enumerate(rows) if number not in skipped]
        if not rows:
            raise ValueError(
                f"no images in {self.archives[0]} ({readable_suffixes()}; found {self.contents.skipped_counts()})"
            )
        order = sorted(range(len(names)), key=lambda i: (names[i][0], tuple(names[i][1].split("/"))))
        self._names = Names(names[i][1] for i in order)
        self._members = np.array([rows[i] for i in order], np.int64)
        self._labels = first_level_classes([names[i][1] for i in order], "/")
        self._files = LocalFiles(self.archives)
        self.contents.images, self.contents.shards = len(rows), len(self.archives)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        archive, offset, packed, size, method, checksum = (int(value) for value in self._members[index])
        check_size(max(packed, size))
        head = self._files.read(archive, offset, _HEADER.size)
        if len(head) < _HEADER.size or head[:4] != b"PK\x03\x04":
            raise OSError(f"no member at byte {offset}")
        *_, name_length, extra_length = _HEADER.unpack(head)
        data = self._files.read(archive, offset + _HEADER.size + name_length + extra_length, packed)
        if method == _DEFLATED:
            try:
                # the directory's size bounds what a damaged or hostile member can unpack to
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
            except zlib.error as error:
                raise OSError(f"damaged in the archive: {error}") from None
        if len(data) != size or zlib.crc32(data) != checksum:
            raise OSError("damaged in the archive: checksum or size differs")
        return data

    def name(self, index: int) -> str:
        return f"{self.archives[int(self._members[index, 0])]}:{self._names[index]}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive that can be read: neither encrypted nor packed by a method zlib does not know."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a zip archive, or cut off ({error}); fetch it again") from None
    for info in members:
        if info.flag_bits & 1:
            raise ValueError(f"{path}:{info.filename}: encrypted; unpack the archive, or pack it without a password")
        if info.compress_type not in (_STORED, _DEFLATED):
            method = {12: "bzip2", 14: "lzma"}.get(info.compress_type, f"method {info.compress_type}")
            raise ValueError(f"{path}:{info.filename}: packed by {method}; stored and deflated members can be read")
    return members
