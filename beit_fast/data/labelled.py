"""Labelled data sets: what a path holds, its classes, and that training and validation agree on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from beit_fast.data import builtin, scenes
from beit_fast.data.sources import (
    VALIDATION_FOLDERS,
    ArraySource,
    FolderSource,
    ImageSource,
    local_path,
    open_source,
    read_file,
)
from beit_fast.data.sources.cifar import is_cifar100, read_cifar100

VALIDATION_SEED = 2_000_003
"""Set of built-in scenes that is never trained on."""
BuiltinSet = Literal["scenes", "hues", "digits"]


@dataclass(frozen=True)
class LabelledImages:
    """A source with one class per image."""

    source: ImageSource
    labels: NDArray[np.int64]
    """(n,), in [0, len(classes))."""
    classes: tuple[str, ...]
    """Their names, in the order of the labels."""

    def __len__(self) -> int:
        return len(self.source)

    def __post_init__(self) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        known = self.source.contents
        empty = {name: 0 for name, count in known.classes.items() if not count and name not in self.classes}
        known.classes = empty | dict(zip(self.classes, counts, strict=True))


def open_training(path: str | os.PathLike[str]) -> LabelledImages:
    """The training images that `path` names.

    A folder with `train` in it, class folders, tar shards with `.cls` entries, or CIFAR-100 (extracted, binary or
    python version). ValueError, in one line, where there are no labels.
    """
    cifar = _cifar_folder(path)
    if cifar is not None:
        return _cifar(cifar, train=True)
    root = local_path(path)
    if not (root / "train").is_dir():
        return _labelled(path)
    images = _labelled(root / "train")
    others = [name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    images.source.contents.notes.append(f"train of {root}" + (f"; beside it: {', '.join(others)}" if others else ""))
    return images


def open_validation(
    path: str | os.PathLike[str], classes: Sequence[str], validation_path: str | os.PathLike[str] | None = None,
    class_map: str | os.PathLike[str] | None = None,
) -> LabelledImages:  # fmt: skip
    """Open the validation images beside the training images `path`, or those of `validation_path`.

    `classes` are the training classes, which the validation set has to share: see `with_classes`.
    """
    if validation_path is not None or _cifar_folder(path) is not None:
        images = open_evaluation(validation_path if validation_path is not None else path)
    else:
        root = local_path(path)
        homes = [root, root.parent] if root.name == "train" else [root]
        folder = next((h / name for h in homes for name in VALIDATION_FOLDERS if (h / name).is_dir()), None)
        if folder is None:
            raise ValueError(
                f"no validation images: {path} has no folder {', '.join(VALIDATION_FOLDERS)}; give "
                "--data.validation-path, or --data.no-validate to train without"
            )
        images = _labelled(folder)
    return with_classes(images, classes, str(validation_path if validation_path is not None else path), class_map)


def open_evaluation(path: str | os.PathLike[str]) -> LabelledImages:
    """The images to evaluate on that `path` names: its folder `val`, the test images of CIFAR-100, or what it holds."""
    cifar = _cifar_folder(path)
    if cifar is not None:
        return _cifar(cifar, train=False)
    inner = [local_path(path) / name for name in VALIDATION_FOLDERS]
    return _labelled(next((folder for folder in inner if folder.is_dir()), path))


def builtin_labelled(
    name: BuiltinSet, cache_dir: str | os.PathLike[str] | None, count: int, size: int, train: bool, seed: int = 0
) -> LabelledImages:
    """Built-in data: `scenes`, drawn, 24 classes = 6 shapes x 4 textures; `hues`, 6 shapes x 4 hues; or `digits`,
    scikit-learn's 1797.

    Training and validation scenes have different seeds and share no image. Of the digits every fifth is for
    validation; `count` and `size` do not apply to them (they are 8 x 8 pixels).
    """
    if name == "digits":
        return _digits(train)
    set_seed, hues = seed if train else VALIDATION_SEED + seed, name == "hues"
    source = builtin.builtin_source(cache_dir, count, set_seed, size, labelled=True, hues=hues)
    kinds = tuple(scenes.HUES) if hues else tuple(texture.__name__ for texture in scenes.TEXTURES)
    classes = tuple(f"{kind} {shape.__name__}" for shape in scenes.SHAPES for kind in kinds)
    return LabelledImages(source, _labels(source, "built-in scenes"), classes)


def _labelled(path: str | os.PathLike[str]) -> LabelledImages:
    source = open_source(path)
    labels = _labels(source, str(path))
    if not isinstance(source, FolderSource):
        return LabelledImages(source, labels, tuple(str(number) for number in range(int(labels.max()) + 1)))
    names: dict[int, str] = {}
    for index in np.unique(labels, return_index=True)[1].tolist():
        relative = os.path.relpath(source.name(index), source.root)
        names[int(labels[index])] = relative.split(os.sep, 1)[0]
    return LabelledImages(source, labels, tuple(names[number] for number in sorted(names)))


def _labels(source: ImageSource, path: str) -> NDArray[np.int64]:
    numbers = [source.label(index) for index in range(len(source))]
    missing = [index for index, label in enumerate(numbers) if label is None]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(numbers)} images have no label, e.g. {source.name(missing[0])}; labels "
            "are first-level folders, or a .cls entry beside every image of a tar shard"
        )
    labels = np.array(numbers, np.int64)
    if labels.min() < 0:
        raise ValueError(f"{path}: label {labels.min()} of {source.name(int(labels.argmin()))}; labels start at 0")
    return labels


def with_classes(
    images: LabelledImages, classes: Sequence[str], path: str, class_map: str | os.PathLike[str] | None = None
) -> LabelledImages:
    """Number the labels of `images` as `classes` are: by a class map, by name, or names that are numbers by number.

    Args:
        images: with classes of their own.
        classes: those of the training or of the model.
        path: of the images, for messages.
        class_map: file with a line per class of the images: its name, a tab or blank, and the name or number of the
            class in `classes`; or the names alone, in the order of `classes`.

    Raises:
        ValueError: the names disagree and nothing says which class is which.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    if class_map is not None:
        moved = _read_class_map(local_path(class_map), images.classes, numbers)
    elif set(images.classes) <= set(classes):
        moved = [numbers[name] for name in images.classes]
    elif all(name.isdecimal() and int(name) < len(classes) for name in images.classes):
        moved = [int(name) for name in images.classes]
    else:
        here = [name for name in images.classes if name not in numbers]
        there = [name for name in classes if name not in set(images.classes)]
        raise ValueError(
            f"{path}: {len(here)} of {len(images.classes)} classes do not occur in training, e.g. "
            f"{', '.join(map(repr, here[:3]))} (only in training: {', '.join(map(repr, there[:3])) or 'none'}); give "
            "them the same names (in tar shards: numbers), or --data.class-map FILE with a line for each: class here, "
            "tab, class in training"
        )
    if len(set(moved)) < len(moved):
        raise ValueError(f"{path}: two of its classes stand for the same class of training")
    return LabelledImages(images.source, np.array(moved, np.int64)[images.labels], tuple(classes))


def _read_class_map(path: Path, names: Sequence[str], numbers: dict[str, int]) -> list[int]:
    """The number of the class of each of `names`."""
    text = os.fsdecode(read_file(str(path)))
    lines = [line.strip("\r").split("\t") if "\t" in line else line.split(None, 1) for line in text.split("\n")]
    pairs = [[word.strip() for word in line] for line in lines if line]
    known: dict[str, int] = {}
    for line_number, (name, *target) in enumerate(pairs):
        number = line_number if not target else numbers.get(target[0])
        if number is None and target[0].isdecimal():
            number = int(target[0])
        if number is None or number >= len(numbers):
            raise ValueError(f"{path}: {name!r} stands for {target[0] if target else line_number!r}, which is no class")
        known[name] = number
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(names)} classes are not in it, e.g. {missing[0]!r}")
    return [known[name] for name in names]


def _cifar_folder(path: str | os.PathLike[str]) -> Path | None:
    root = local_path(path)
    candidates = (root, root / "cifar-100-binary", root / "cifar-100-python")
    return next((folder for folder in candidates if folder.is_dir() and is_cifar100(folder)), None)


def _cifar(folder: Path, train: bool) -> LabelledImages:
    images, labels, classes = read_cifar100(folder, train)
    return LabelledImages(ArraySource(images, labels.tolist()), labels, classes)


def _digits(train: bool) -> LabelledImages:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ModuleNotFoundError("built-in digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 != 0) == train
    images = np.clip(digits.images[chosen] * (255 / 16), 0, 255).round().astype(np.uint8)
    labels = digits.target[chosen].astype(np.int64)
    return LabelledImages(ArraySource(images, labels.tolist()), labels, tuple("0123456789"))
