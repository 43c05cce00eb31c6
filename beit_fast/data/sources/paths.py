"""From a path that a user gives to a source."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from beit_fast.data.sources.archives import ZipSource
from beit_fast.data.sources.files import spooled
from beit_fast.data.sources.folders import first_image, open_folder
from beit_fast.data.sources.parquet import ParquetSource
from beit_fast.data.sources.shards import TarSource
from beit_fast.data.sources.source import ImageSource, default_cache_dir

_PACKED: dict[str, Callable[[Sequence[Path]], ImageSource]] = {
    ".tar": TarSource, ".zip": ZipSource, ".parquet": ParquetSource,
}  # fmt: skip
TRAINING_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "validation", "test")


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path with `~` expanded: a shell does not where the word begins with an option."""
    return Path(os.path.expanduser(os.fspath(path)))


def open_source(path: str | os.PathLike[str]) -> ImageSource:
    """Open what `path` names.

    - a folder with images at any depth. Where every image lies below a first-level folder, those folders, sorted by
      name, are the classes;
    - a folder with `.tar` shards, `.zip` archives or `.parquet` files, one such file, or a pattern of them:
      `/data/train-{0000..0146}.tar`, `/data/*.zip`;
    - remote shards: `https://host/train-{0000..0146}.tar`, `s3://...`, or whatever fsspec knows;
    - `pipe:COMMAND`, whose output is a shard; it is kept in the cache folder.

    Hidden files and folders, and helper folders of systems (`@eaDir`, `__MACOSX`, ...), are left out.

    Raises:
        ValueError: there is nothing to train on, or data in two forms; in one line.
        ModuleNotFoundError: parquet files without pyarrow.
    """
    text = os.fspath(path)
    if text.startswith("pipe:"):
        if os.environ.get("BEIT_FAST_ALLOW_PIPE") != "1":
            raise ValueError(f"{text}: runs a command; set BEIT_FAST_ALLOW_PIPE=1 where that is intended")
        return TarSource([spooled(c, default_cache_dir() / "pipes") for c in _expand_braces(text[len("pipe:") :])])
    if "://" in text:
        urls = _expand_braces(text)
        if not all(url.endswith(".tar") for url in urls) or any(sign in text for sign in "*?["):
            raise ValueError(f"{text}: of remote data, tar shards can be read: https://host/train-{{000..146}}.tar")
        return TarSource(urls)
    root = local_path(path)
    try:
        if root.is_dir():
            return _open_directory(root)
        if root.suffix.lower() in _PACKED or any(sign in text for sign in "*?[{"):
            return _open_packed(str(root))
    except PermissionError as error:
        raise ValueError(f"cannot read {error.filename or root}: permission denied") from error
    if not root.exists():
        raise ValueError(f"no such folder: {root}{_nearest(root)}")
    raise ValueError(f"{root} is a file; give the folder that holds the images, or {', '.join(_PACKED)} files")


def _open_directory(root: Path) -> ImageSource:
    packed: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()):
        if entry.suffix.lower() in _PACKED and not entry.name.startswith(".") and entry.is_file():
            packed.setdefault(entry.suffix.lower(), []).append(entry)
    if not packed:
        return open_folder(root)
    forms = [f"{suffix} files ({files[0].name}, {len(files)} in all)" for suffix, files in packed.items()]
    image = first_image(root)
    if image is not None:
        forms.append(f"image files ({image})")
    (suffix, files), *_ = packed.items()
    if len(forms) > 1:
        raise ValueError(
            f"{root} holds {' and '.join(forms)}; move one kind away, or give {root}/*{suffix} to read those alone"
        )
    return _PACKED[suffix](files)


def _open_packed(pattern: str) -> ImageSource:
    """Open the files that a path or pattern names."""
    files = [Path(name) for part in _expand_braces(pattern) for name in sorted(glob.glob(part)) or [part]]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"no such file: {missing[0]} ({len(missing)} of the {len(files)} shards of {pattern})")
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in _PACKED:
        raise ValueError(
            f"{pattern}: names {', '.join(suffixes)} files; give files of one kind of {', '.join(_PACKED)}"
        )
    return _PACKED[suffixes[0]](files)


def open_training_source(path: str | os.PathLike[str]) -> ImageSource:
    """Open the images to train on without labels: what `path` names, or its `train` where it has `val` beside it."""
    root = local_path(path)
    train = next((root / name for name in TRAINING_FOLDERS if (root / name).is_dir()), None)
    held_out = [name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    if train is None or not held_out:
        return open_source(path)
    source = open_source(train)
    source.contents.notes.append(f"{root} has {train.name} and {', '.join(held_out)}: {train.name} alone is trained on")
    return source


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
        elif number % 2 and "," not in part:  # no choice: the shell leaves such braces as they are
            choices.append([f"{{{part}}}"])
        else:
            choices.append(part.split(",") if number % 2 else [part])
    return ["".join(choice) for choice in product(*choices)]
