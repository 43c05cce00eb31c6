"""Visual tokens on disk: a record per sample and epoch of the views' cycle, written once and read from then on.

One file: a header of 4096 bytes with the settings that the tokens depend on, then records of equal size, each its
tokens as uint16 and a crc32 of them. The crc32 starts from the settings and the record's number, and 0 stands for
"not written": whatever a kill, a power cut or a full disk leaves behind, a record is either right or absent. So writers
need no order, no lock and no log, and all ranks that see the file share it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"beit_fast tokens 1\n"
HEADER_BYTES = 4096
_CRC_BYTES = 4


class RowFile:
    """Rows of equal size behind a header, read and written by their number.

    Not a memory map: where its file is cut off, or the disk is full, a map ends the process by SIGBUS.

    Args:
        path: an existing file.
        header_bytes: where row 0 begins.
        row_bytes: size of a row.
    """

    def __init__(self, path: Path, header_bytes: int, row_bytes: int) -> None:
        self.path, self.header_bytes, self.row_bytes = path, header_bytes, row_bytes
        self._file = -1
        self._file = os.open(path, (os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) | os.O_CLOEXEC)

    def read(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Rows (b, row_bytes), and which of them the file holds whole (b,); zeros in place of the others.

        Raises:
            OSError: the file cannot be read; the message names it.
        """
        rows = np.zeros((len(numbers), self.row_bytes), np.uint8)
        whole = np.zeros(len(numbers), np.bool_)
        try:
            for row, number in enumerate(numbers.tolist()):
                read = os.preadv(self._file, [rows[row]], self.header_bytes + number * self.row_bytes)
                whole[row] = read == self.row_bytes
        except OSError as error:
            raise OSError(
                error.errno, f"cannot read {self.path}: {error.strerror}; mend the disk, or delete it"
            ) from error
        rows[~whole] = 0
        return rows, whole

    def write(self, number: int, data: bytes) -> None:
        """Write row `number`.

        Raises:
            OSError: it cannot be written whole; the message names the file and what is free.
        """
        try:
            if os.pwrite(self._file, data, self.header_bytes + number * self.row_bytes) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _named(error, self.path, len(data)) from error

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close


def create_row_file(path: Path, header: bytes, size: int) -> None:
    """Make a file of `size` bytes with its disk space, under another name first: what bears `path` has a header.

    Raises:
        OSError: it does not fit on the disk; the message names the file and the MiB.
    """
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with work.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                    raise
                file.truncate(size)  # a file system that cannot reserve space
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except OSError as error:
        raise _named(error, path, size) from error
    finally:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)


def _named(error: OSError, path: Path, size: int) -> OSError:
    free = shutil.disk_usage(existing_parent(path)).free / 2**20
    return OSError(
        f"cannot write {path}: {error.strerror or error}; {size / 2**20:,.2f} MiB are needed, {free:,.2f} MiB free: "
        "free some space or put it on another disk"
    )


class TokenStore:
    """The tokens of `cycle` epochs of `num_samples` samples, `num_tokens` each.

    Where the file is missing it is created, with the disk space it will take: OSError with the numbers where there is
    too little. `settings` are JSON values; ValueError naming the difference where the file was made with others.
    A damaged file is moved aside (to `<path>.damaged`) and begun anew; `note` then says so. Damaged records count as
    absent and in `damaged_records`.
    """

    def __init__(
        self, path: Path, *, num_samples: int, num_tokens: int, cycle: int, settings: Mapping[str, Any]
    ) -> None:
        for name, value in (("num_samples", num_samples), ("num_tokens", num_tokens), ("cycle", cycle)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.path, self.num_samples, self.num_tokens, self.cycle = path, num_samples, num_tokens, cycle
        self.settings = _complete(settings, num_samples, num_tokens, cycle)
        self.record_bytes = 2 * num_tokens + _CRC_BYTES
        self.bytes = store_bytes(num_samples, num_tokens, cycle)
        self.damaged_records = 0
        self.note: str | None = None
        header = _header(self.settings)
        self._salt = zlib.crc32(header)
        with _exclusive(path):
            if _look(path, self.settings, self.bytes) == "damaged":
                aside = path.with_name(path.name + ".damaged")
                os.replace(path, aside)
                self.note = f"token cache {path} is damaged: begun anew, the old file is {aside}"
            if not path.exists():
                require_space(path, self.bytes)
                create_row_file(path, header, self.bytes)
            self._file = RowFile(path, HEADER_BYTES, self.record_bytes)

    def read(self, epoch: int, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """Tokens (b, P) of samples `indices` (b,) in `epoch`, and whether they are there (b,); zeros where not."""
        numbers = self._numbers(epoch, indices)
        rows, _ = self._file.read(numbers)  # what the file lacks reads as zeros, and has no valid crc32
        crcs = rows[:, -_CRC_BYTES:].copy().view("<u4")[:, 0]
        tokens = rows[:, :-_CRC_BYTES].copy().view("<u2").astype(np.uint16, copy=False)
        present = np.zeros(len(numbers), np.bool_)
        for row in np.flatnonzero(crcs):
            present[row] = self._crc(int(numbers[row]), rows[row, :-_CRC_BYTES].tobytes()) == crcs[row]
        self.damaged_records += int(np.count_nonzero(crcs)) - int(present.sum())
        tokens[~present] = 0
        return tokens, present

    def write(self, epoch: int, indices: NDArray[np.int64], tokens: NDArray[Any]) -> None:
        """Keep tokens (b, P), integers below 65536, of samples `indices` (b,) in `epoch`.

        Raises:
            OSError: they cannot be written; what is there stays right, and they are absent.
        """
        if tokens.shape != (len(indices), self.num_tokens):
            raise ValueError(f"tokens must be {(len(indices), self.num_tokens)}, got {tokens.shape}")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 16:
            raise ValueError(f"tokens must lie in [0, 65536), got [{tokens.min()}, {tokens.max()}]")
        small = np.ascontiguousarray(tokens, "<u2")
        for number, row in zip(self._numbers(epoch, indices).tolist(), small, strict=True):
            data = row.tobytes()
            record = data + self._crc(number, data).to_bytes(_CRC_BYTES, "little")
            # what a full disk cuts short has no valid crc32 and is written again another time
            self._file.write(number, record)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _numbers(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_samples:
            raise ValueError(f"indices must lie in [0, {self.num_samples}), got [{indices.min()}, {indices.max()}]")
        return (epoch % self.cycle) * self.num_samples + indices

    def _crc(self, number: int, data: bytes) -> int:
        return zlib.crc32(data, zlib.crc32(number.to_bytes(8, "little"), self._salt)) or 1


def store_bytes(num_samples: int, num_tokens: int, cycle: int) -> int:
    """Size of the file: 396 bytes per sample and epoch of the cycle for 14 x 14 tokens."""
    return HEADER_BYTES + cycle * num_samples * (2 * num_tokens + _CRC_BYTES)


def check_store(path: Path, *, num_samples: int, num_tokens: int, cycle: int, settings: Mapping[str, Any]) -> None:
    """Whether `TokenStore` could be opened or made with these arguments: its errors, and nothing is written."""
    size = store_bytes(num_samples, num_tokens, cycle)
    if _look(path, _complete(settings, num_samples, num_tokens, cycle), size) != "usable":
        require_space(path, size)


def require_space(path: Path, size: int) -> None:
    """OSError, with the numbers, where the disk of `path` cannot take `size` bytes."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"token cache {path} needs {size / 2**20:,.0f} MiB, the disk has {free / 2**20:,.0f} MiB free; give "
            "another --data.token-cache, a smaller --data.view-cycle, or --data.token-cache off",
        )


def _look(path: Path, settings: Mapping[str, Any], size: int) -> str:
    """What is at `path`: "missing", "usable" or "damaged"; ValueError where it is no file or another store."""
    if not path.exists():
        return "missing"
    if not path.is_file():
        raise ValueError(f"token cache {path} is not a file; give another --data.token-cache")
    with path.open("rb") as file:
        stored = _read_header(file.read(HEADER_BYTES))
    if stored is None:
        return "damaged"
    names = [name for name in sorted({*stored, *settings}) if stored.get(name) != settings.get(name)]
    if names:
        pairs = ", ".join(f"{name} {stored.get(name)}, now {settings.get(name)}" for name in names)
        raise ValueError(
            f"token cache {path} was made with {pairs}; restore the settings, give another --data.token-cache, or "
            "delete the file"
        )
    return "usable" if path.stat().st_size == size else "damaged"


def _complete(settings: Mapping[str, Any], num_samples: int, num_tokens: int, cycle: int) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    sizes = {"num_samples": num_samples, "num_tokens": num_tokens, "view_cycle": cycle}
    plain = json.loads(json.dumps({**settings, **sizes}))
    assert isinstance(plain, dict)
    return plain


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _header(settings: Mapping[str, Any]) -> bytes:
    text = json.dumps(settings, sort_keys=True).encode()
    body = MAGIC + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    if len(body) > HEADER_BYTES:
        raise ValueError(f"settings of the token cache take {len(body)} bytes, more than {HEADER_BYTES}")
    return body.ljust(HEADER_BYTES, b"\0")


def _read_header(data: bytes) -> dict[str, Any] | None:
    """The settings, or None where the header is not the one that they would be given."""
    at = len(MAGIC) + 4
    length = int.from_bytes(data[at : at + 4], "little")
    try:
        stored = json.loads(data[at + 4 : at + 4 + length])
        return stored if isinstance(stored, dict) and _header(stored) == data else None
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One process at a time looks at and creates the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
