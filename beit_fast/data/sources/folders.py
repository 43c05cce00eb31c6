"""Images as files of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.sources.contents import ARRAY_SUFFIX, Contents, readable_suffixes
from beit_fast.data.sources.source import Names, arrays_to_skip, is_helper, is_image, read_file, suffix_kind


class FolderSource:
    """Image files under a root.

    Args:
        root: the folder.
        names: paths relative to it.
        labels: one class per file; None: there are none.
        contents: what was found in the folder; None: just these images.
    """

    def __init__(
        self, root: Path, names: Iterable[str], labels: NDArray[np.int32] | None = None,
        contents: Contents | None = None,
    ) -> None:  # fmt: skip
        self.root = root
        self._names = Names(names)
        self._labels = labels
        self.contents = contents or Contents(str(root), "folders")
        self.contents.images = len(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.root, self._names[index]))

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._names[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


def open_folder(root: Path) -> FolderSource:
    """Open the images of a folder, at any depth, ordered by their paths.

    Where every image lies below a first-level folder, those folders, ordered by name, are the classes.

    Raises:
        ValueError: there is no image.
    """
    contents = Contents(str(root), "folders")
    names = list(_images_of(root, "", contents, {os.path.realpath(root)}))
    if skipped := arrays_to_skip(names):
        for number in sorted(skipped):
            contents.skip(suffix_kind(names[number]), names[number])
        names = [name for number, name in enumerate(names) if number not in skipped]
    if not names:
        raise ValueError(f"no images in {root} ({readable_suffixes()}; found {contents.skipped_counts()})")
    tops = [name.split(os.sep, 1)[0] if os.sep in name else None for name in names]
    if None in tops:
        return FolderSource(root, names, None, contents)
    contents.classes |= {top: 0 for top in tops if top is not None}
    contents.classes = dict(sorted(contents.classes.items()))
    for top in tops:
        contents.classes[str(top)] += 1
    numbers = {name: number for number, name in enumerate(n for n, count in contents.classes.items() if count)}
    return FolderSource(root, names, np.array([numbers[str(top)] for top in tops], np.int32), contents)


def first_image(root: Path) -> str | None:
    """Path below `root` of an image; None where there is none."""
    names = _images_of(root, "", Contents(str(root), "folders"), {os.path.realpath(root)})
    return next((name for name in names if not name.lower().endswith(ARRAY_SUFFIX)), None)


def _images_of(root: Path, folder: str, contents: Contents, entered: set[str]) -> Iterator[str]:
    """Paths below `root` of the images of a folder, ordered by name at every depth."""
    with os.scandir(os.path.join(root, folder)) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name = os.path.join(folder, entry.name)
        if entry.is_dir():
            if is_helper(entry.name):
                contents.skip("helper folder", name)
            elif entry.is_symlink() and _is_circle(entry.path, root, entered):
                contents.skip("link to a folder that is read already", name)
            else:
                if not folder:
                    contents.classes[entry.name] = 0
                yield from _images_of(root, name, contents, entered)
        elif not is_image(entry.name):
            contents.skip(suffix_kind(entry.name), name)
        elif entry.is_file() or entry.is_symlink():  # where a link leads nowhere, reading says so
            yield name
        else:
            contents.skip("pipe, socket or device", name)


def _is_circle(path: str, root: Path, entered: set[str]) -> bool:
    target = os.path.realpath(path)
    circle = target in entered or str(root.resolve()).startswith(target + os.sep)
    entered.add(target)
    return circle
