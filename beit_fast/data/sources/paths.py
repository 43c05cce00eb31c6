"""From a path that a user gives to a source."""

from __future__ import annotations

import glob
import os
import re
from itertools import product
from pathlib import Path

from beit_fast.data.sources.files import spooled
from beit_fast.data.sources.folders import open_folder
from beit_fast.data.sources.shards import TarSource
from beit_fast.data.sources.source import ImageSource, default_cache_dir


def open_source(path: str | os.PathLike[str]) -> ImageSource:
    """Open what `path` names.

    - a folder with images at any depth. Where every image lies below a first-level folder, those folders, sorted by
      name, are the classes;
    - a folder with `.tar` shards, one shard, or a pattern of them: `/data/train-{0000..0146}.tar`, `/data/*.tar`;
    - remote shards: `https://host/train-{0000..0146}.tar`, `s3://...`, or whatever fsspec knows;
    - `pipe:COMMAND`, whose output is a shard; it is kept in the cache folder.

    Files whose name starts with a dot are left out. ValueError, in one line, where there is nothing to train on.
    """
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("pipe:"):
        if os.environ.get("BEIT_FAST_ALLOW_PIPE") != "1":
            raise ValueError(f"{text}: runs a command; set BEIT_FAST_ALLOW_PIPE=1 where that is intended")
        return TarSource([spooled(c, default_cache_dir() / "pipes") for c in _expand_braces(text[len("pipe:") :])])
    if "://" in text:
        urls = _expand_braces(text)
        if not all(url.endswith(".tar") for url in urls) or any(sign in text for sign in "*?["):
            raise ValueError(f"{text}: of remote data, tar shards can be read: https://host/train-{{000..146}}.tar")
        return TarSource(urls)
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
        return TarSource(shards) if shards else open_folder(root)
    except PermissionError as error:
        raise ValueError(f"cannot read {error.filename or root}: permission denied") from error


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
