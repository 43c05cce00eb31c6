"""Fetch a file over HTTP, continuing where an interrupted attempt stopped."""

import contextlib
import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from beit_fast.tokenizers.base import TokenizerError

__all__ = ["default_cache_dir", "exclusive", "fetch"]

_CHUNK = 1 << 20


def default_cache_dir() -> Path:
    """Give `$BEIT_FAST_CACHE`, else `$XDG_CACHE_HOME/beit_fast`, else `~/.cache/beit_fast`.

    Raises:
        TokenizerError: none of them is set, and there is no home folder.
    """
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "beit_fast"
    try:
        return Path(os.environ.get("BEIT_FAST_CACHE") or shared).expanduser()
    except RuntimeError:
        raise TokenizerError("there is no home folder to keep the cache in; set BEIT_FAST_CACHE to a folder") from None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process in at a time on this machine: the other ranks of a run wait here while one fetches."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(url: str, destination: Path, *, timeout_s: float = 30.0) -> None:
    """Download `url` to `destination`, where the file appears only when it is complete.

    The partial file lies in the same folder and is continued by the next attempt, in this process or a later one. An
    attempt that brought some bytes is followed by another; one that brought none gives up.

    Raises:
        TokenizerError: with the reason; the partial file stays.
    """
    # the URL is part of the name: bytes of two mirrors are never joined
    part = destination.with_name(f"{destination.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
    destination.parent.mkdir(parents=True, exist_ok=True)
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            total = _attempt(url, part, have, timeout_s)
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason, total = str(getattr(error, "reason", "") or error or type(error).__name__), -1
            if isinstance(error, urllib.error.HTTPError):
                raise TokenizerError(f"{url}: HTTP {error.code} {reason}") from error
        else:
            reason = f"the connection ended early, at {part.stat().st_size} of {total} bytes"
        size = part.stat().st_size if part.exists() else 0
        if size == total:
            os.replace(part, destination)
            return
        if size <= have:
            raise TokenizerError(f"{url}: {reason}")


def _attempt(url: str, part: Path, have: int, timeout_s: float) -> int:
    """Append to `part` what the server still gives; return the size of the whole file."""
    headers = {"User-Agent": "beit_fast"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: the server has nothing beyond these bytes
            raise
        with error:
            total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == have:
            return have
        part.unlink()  # not a prefix of what is offered now
        return _attempt(url, part, 0, timeout_s)
    with response:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        resumed = response.status == 206 and span is not None and int(span[1]) == have
        if have and not resumed:
            have = 0  # the server sends everything again
        length = int(span[2]) if span and resumed else int(response.headers.get("Content-Length", -1))
        print(f"fetching {url}" + (f" from byte {have}" if have else ""), file=sys.stderr)
        with part.open("ab" if resumed else "wb") as file:
            done, shown = have, have * 10 // max(length, 1)
            # read1 returns what has arrived, so that a broken connection loses nothing already received
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if done * 10 // max(length, 1) > shown and 0 < length > 50 << 20:
                    shown = done * 10 // length
                    print(f"  {done >> 20} of {length >> 20} MiB", file=sys.stderr)
        return length if length >= 0 else done
