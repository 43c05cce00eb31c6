"""Images as files of a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.sources.source import Names, first_level_classes, is_image, readable_suffixes


class FolderSource:
    """Image files under a root. `names` are paths relative to it, `labels` one class per file or None."""

    def __init__(self, root: Path, names: Iterable[str], labels: NDArray[np.int32] | None = None) -> None:
        self.root = root
        self._names = Names(names)
        self._labels = labels

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self._names[index]), "rb", buffering=0) as file:
            return file.read()

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._names[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


def open_folder(root: Path) -> FolderSource:
    names: list[str] = []
    others: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise error

    entered = {os.path.realpath(root)}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:
            target = os.path.realpath(os.path.join(folder, name))
            if target in entered or str(root.resolve()).startswith(target + os.sep):  # a link in a circle
                subfolders.remove(name)
            entered.add(target)
        relative = os.path.relpath(folder, root)
        for name in sorted(files):
            if is_image(name):
                names.append(name if relative == "." else os.path.join(relative, name))
            else:
                others[os.path.splitext(name)[1] or name] += 1
    if not names:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        raise ValueError(f"no images in {root} ({readable_suffixes()}; found {found or 'nothing'})")
    names.sort(key=lambda name: tuple(name.split(os.sep)))
    return FolderSource(root, names, first_level_classes(names, os.sep))
