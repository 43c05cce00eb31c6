"""Bytes at a position of many files: local ones through a bounded pool of descriptors, remote ones through fsspec."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from beit_fast.data.sources.source import SourceUnavailable

OPEN_FILES = 256
"""Most shards of one source that are open at once; the usual limit of a process is 1,024 descriptors."""
TRIES = 8
"""Times that a remote read is tried, with pauses from 0.1 s that double: half a minute in all."""


class Files(Protocol):
    """Numbered files that several threads read at once."""

    names: list[str]

    def size(self, number: int) -> int:
        """Bytes of a file."""

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""

    def version(self, number: int) -> str:
        """What differs when the content of a file has changed."""


class _Descriptor:
    """An open file, closed when no thread holds it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalFiles:
    """Files of this machine; at most `OPEN_FILES` are open."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.names = [str(path) for path in paths]
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def size(self, number: int) -> int:
        return os.path.getsize(self.names[number])

    def version(self, number: int) -> str:
        state = os.stat(self.names[number])
        return f"{state.st_size} {state.st_mtime_ns}"

    def read(self, number: int, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._open.pop(number, None) or _Descriptor(self.names[number])
            self._open[number] = file  # last: the most recently used
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return os.pread(file.number, size, offset)


class RemoteFiles:
    """Files behind URLs that fsspec knows: `https://`, `s3://`, `gs://`, ...; every read asks for a range of bytes.

    Args:
        urls: one file each, all on one file system.

    Raises:
        ModuleNotFoundError: fsspec, or its package for this kind of URL, is not installed.
        SourceUnavailable: a server does not answer after `TRIES` tries, or has no such file.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        try:
            import fsspec
        except ModuleNotFoundError:
            raise ModuleNotFoundError(f"{urls[0]}: reading it needs fsspec: pip install '.[remote]'") from None
        try:
            self._system: Any = fsspec.core.url_to_fs(urls[0])[0]
        except (ImportError, ValueError) as error:
            raise ModuleNotFoundError(f"{urls[0]}: {str(error).splitlines()[0]}") from None
        self.names = list(urls)
        self._sizes: dict[int, int] = {}

    def size(self, number: int) -> int:
        if number not in self._sizes:
            self._sizes[number] = int(self._information(number)["size"])
        return self._sizes[number]

    def version(self, number: int) -> str:
        known = self._information(number)
        return " ".join(str(known.get(key)) for key in ("size", "ETag", "etag", "mtime", "LastModified", "generation"))

    def read(self, number: int, offset: int, size: int) -> bytes:
        size = min(size, self.size(number) - offset)
        return b"" if size <= 0 else self._persistent(number, lambda: self._range(number, offset, size))

    def _range(self, number: int, offset: int, size: int) -> bytes:
        data = bytes(self._system.cat_file(self.names[number], start=offset, end=offset + size))
        if len(data) != size:
            raise ConnectionError(f"{len(data)} of {size} bytes at {offset}")
        return data

    def _information(self, number: int) -> dict[str, Any]:
        known: dict[str, Any] = self._persistent(number, lambda: self._system.info(self.names[number]))
        if known.get("size") is None:
            raise SourceUnavailable(f"{self.names[number]}: the server does not say its size, so no part can be read")
        return known

    def _persistent(self, number: int, act: Any) -> Any:
        """What `act` returns, tried again where the connection failed."""
        for attempt in range(TRIES):
            try:
                return act()
            except (FileNotFoundError, PermissionError) as error:
                raise SourceUnavailable(
                    f"{self.names[number]}: {type(error).__name__}; is the address right?"
                ) from error
            except Exception as error:  # each file system has its own classes for a connection that failed
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                failure = error
            time.sleep(0.1 * 2**attempt * (1 + random.random()) / 2)
        raise SourceUnavailable(f"{self.names[number]}: cannot be reached after {TRIES} tries ({reason})") from failure


def spooled(command: str, folder: Path) -> Path:
    """The output of a `pipe:` command as a file of the cache, made where there is none.

    Raises:
        SourceUnavailable: the command fails; its last line of errors is part of the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(command.encode()).hexdigest()[:16]}.tar"
    if path.exists():
        return path
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
            file.flush()
            os.fsync(file.fileno())
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise SourceUnavailable(f"pipe:{command}: exit code {done.returncode} ({last[0][:200]})")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
