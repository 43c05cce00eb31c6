"""Errors of files that cannot be written: the file, what is left of the disk, and the way out, in one line."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""What a full disk says."""


class WriteError(OSError):
    """A file could not be written; the message is written for the user."""


def mib(count: int) -> str:
    """Bytes in readable form: `3,571 MiB`."""
    return f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:,.2f} MiB"


def write_error(error: OSError, path: Path, need: int = 0) -> WriteError:
    """The error of a file of `need` bytes that could not be written: its path, what is left, and the way out."""
    if isinstance(error, WriteError):
        return error
    reason = f"cannot write {path}: {error.strerror or error}"
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            disk = os.statvfs(next(folder for folder in path.absolute().parents if folder.is_dir()))
            if disk.f_files and not disk.f_favail:
                return WriteError(error.errno, f"{reason}; the file system has no inodes left: remove some files")
            needed = f", {mib(need)} are needed" if need >= 2**14 else ""
            reason += f"; {mib(disk.f_bavail * disk.f_frsize)} are free{needed}"
        reason += ": free some space or choose another --output-dir"
    return WriteError(error.errno, reason)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` where a full disk ends what is inside."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or isinstance(error, WriteError):
            raise
        raise write_error(error, Path(error.filename or path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file; a full disk is an error that names it."""
    with naming(path):
        path.write_text(text, errors="surrogateescape")
