"""Images with a class for every pixel: folders, label files, built-in scenes.

A label file is a picture whose pixel values are numbers of classes: 8 or 16 bits of gray, or a palette, of which the
index counts and not the colour. They are read with Pillow, because decoders for photographs give a palette's colours.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beit_fast.data import builtin, scenes
from beit_fast.data.decoding import oriented
from beit_fast.data.screening import Header, Rejection, screen
from beit_fast.data.sources import FolderSource, ImageSource, local_path, open_source, read_file

IGNORE = -1
"""Of a pixel that counts neither in the loss nor in a score."""
VALIDATION_SEED = 2_000_003
"""Set of built-in scenes that is never trained on."""
_IMAGES = ("images", "img", "JPEGImages")
_LABELS = ("annotations", "labels", "masks", "ann", "SegmentationClass")
_TRAINING = ("training", "train")
_VALIDATION = ("validation", "val", "valid", "test")
_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".pgm")
_NAMES = ("classes.txt", "objectInfo150.txt")


@dataclass(frozen=True)
class LabelRule:
    """What the numbers in label files mean."""

    num_classes: int
    reduce_zero: bool = False
    """0 is not a class but "nothing", and class k is written as k + 1 (ADE20K)."""
    ignore_value: int = 255
    """Number, in the file, of pixels that do not count."""

    def apply(self, numbers: NDArray[np.integer], name: str) -> NDArray[np.int64]:
        """Classes in [0, num_classes) and `IGNORE`; ValueError, naming file and pixel, for any other number."""
        classes = numbers.astype(np.int64)
        ignored = classes == self.ignore_value
        if self.reduce_zero:
            ignored |= classes == 0
            classes -= 1
        classes[ignored] = IGNORE
        outside = (classes >= self.num_classes) | (classes < IGNORE)
        if outside.any():
            row, column = (int(indices[0]) for indices in np.nonzero(outside))
            first = int(self.reduce_zero)
            raise ValueError(
                f"{name}: label {int(numbers[row, column])} at row {row}, column {column} is none of the "
                f"{self.num_classes} classes, which are written {first} to {self.num_classes - 1 + first}"
                f" ({self.ignore_value}: ignored); check --data.num-classes and --data.reduce-zero-label"
            )
        return classes


@dataclass(frozen=True)
class SegmentationImages:
    """A source of images, and the label file of each."""

    source: ImageSource
    labels: tuple[Path, ...]
    """One per image, in the order of the source."""
    rule: LabelRule
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.source):
            raise ValueError(f"labels: {len(self.labels)} files for {len(self.source)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def check_labels(self, seed: int, count: int = 256) -> LabelCounts:
        """Count the pixels of some label maps, drawn by `seed`, and note them in the contents of the source.

        Raises:
            ValueError: nearly all pixels are ignored, or all that count are of one class: a score would say nothing.
        """
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count]).tolist()
        result = LabelCounts(np.zeros(self.rule.num_classes + 1, np.int64), 0)
        with ThreadPoolExecutor(4) as pool:
            for labels in pool.map(self._labels, chosen):
                result = result if labels is None else result.plus(labels)
        if not result.maps:
            return result
        folder, line = os.path.dirname(self.labels[0]), result.line(self.classes)
        hint = (
            f"{self.rule.ignore_value} in a label file means ignored (--data.ignore-label)"
            + (", and so does 0 (--data.reduce-zero-label)" if self.rule.reduce_zero else "")
            + "; masks of 0 and 255 need their second class written as 1"
        )
        if result.ignored_share > 0.9 or (len(self.classes) > 1 and np.count_nonzero(result.pixels[1:]) < 2):
            raise ValueError(f"{folder}: {line}: nothing can be learnt or measured; {hint}")
        self.source.contents.notes.append(line)
        return result

    def _labels(self, index: int) -> NDArray[np.int64] | None:
        """The label map of an image; None where it cannot be read, which is reported where it is read in earnest."""
        path = str(self.labels[index])
        try:
            return self.rule.apply(read_numbers(read_file(path), path), path)
        except OSError:
            return None

    def read_label(self, index: int, header: Header) -> NDArray[np.int64] | Rejection:
        """Return the label map int64 (H, W) of image `index`, whose size is `header`'s.

        A file that is missing or damaged gives a Rejection, like a damaged image.

        Raises:
            ValueError: it is a colour picture, of another size than the image, or has a number that is no class.
        """
        path = self.labels[index]
        try:
            numbers = read_numbers(read_file(str(path)), str(path))
        except OSError as error:
            return Rejection(f"its label {path} cannot be read: {error.strerror or error}")
        if numbers.shape != (header.height, header.width):
            raise ValueError(
                f"{path}: the label is {numbers.shape[1]} x {numbers.shape[0]} pixels, its image "
                f"{self.source.name(index)} {header.width} x {header.height}; both have to be of one size"
            )
        return self.rule.apply(numbers, str(path))


@dataclass(frozen=True)
class LabelCounts:
    """Pixels of label maps: how many of each class, and how many that do not count."""

    pixels: NDArray[np.int64]
    """(C + 1,): ignored ones, then those of each class."""
    maps: int

    def plus(self, labels: NDArray[np.int64]) -> LabelCounts:
        """The counts with another label map (H, W)."""
        pixels = np.bincount((labels - IGNORE).ravel(), minlength=len(self.pixels))
        return LabelCounts(self.pixels + pixels, self.maps + 1)

    @property
    def ignored_share(self) -> float:
        return float(self.pixels[0]) / max(int(self.pixels.sum()), 1)

    def line(self, classes: Sequence[str]) -> str:
        """The same for people."""
        absent = [name for name, count in zip(classes, self.pixels[1:], strict=False) if not count]
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        without = f"; {len(absent)} of {len(classes)} classes without a pixel ({shown})" if absent else ""
        return f"{self.maps:,} label maps: {100 * self.ignored_share:.1f} % of the pixels ignored{without}"


def read_numbers(data: bytes, name: str) -> NDArray[np.integer]:
    """The numbers (H, W) in an encoded label picture; of a palette its indices.

    Raises:
        ValueError: it is a colour picture.
        OSError: it cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(data))
        if picture.mode not in ("P", "L", "1", "I") and not picture.mode.startswith("I;16"):
            raise ValueError(
                f"{name}: a picture of mode {picture.mode}; a label file has one number per pixel (gray of 8 or 16 "
                "bits, or a palette)"
            )
        numbers = np.asarray(picture)
    except UnidentifiedImageError:
        raise OSError("no picture") from None
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None
    header = screen(data)
    if isinstance(header, Header) and header.format != "tiff":  # of TIFF Pillow has applied it
        numbers = oriented(numbers, header)
    return numbers.astype(np.uint8) if numbers.dtype == np.bool_ else numbers


def open_segmentation(
    path: str | os.PathLike[str], train: bool, num_classes: int | None, reduce_zero: bool, ignore_value: int
) -> SegmentationImages:
    """The training or the validation images of a folder.

    Layouts: `images/training` with `annotations/training` (ADE20K; also `train`, `validation`, `val`), `train/images`
    with `train/labels`, or, for training or where nothing is split, `images` with `labels`. A label has its image's
    name. Names of classes are read from `classes.txt` (one per line) or ADE20K's `objectInfo150.txt`.

    Raises:
        ValueError: in one line, where there is no such folder, or images have no label.
    """
    root = local_path(path)
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    images, labels = _folders(root, train)
    source = open_source(images)
    if not isinstance(source, FolderSource):
        raise ValueError(f"{images}: holds tar shards; segmentation reads folders of image and label files")
    files: dict[Path, Path] = {}
    for file in sorted(file for file in labels.rglob("*") if file.suffix.lower() in _SUFFIXES):
        key = file.relative_to(labels).with_suffix("")
        if key in files:
            raise ValueError(f"{labels}: two label files for {key}: {files[key].name} and {file.name}; remove one")
        files[key] = file
    keys = [Path(os.path.relpath(source.name(i), images)).with_suffix("") for i in range(len(source))]
    missing = [number for number, key in enumerate(keys) if key not in files]
    if missing:
        raise ValueError(
            f"{labels}: {len(missing)} of {len(keys)} images have no label, e.g. {source.name(missing[0])} "
            f"({keys[missing[0]]}.png is missing)"
        )
    names = _class_names(root)
    count = num_classes if num_classes is not None else len(names) or None
    if count is None:
        raise ValueError(f"{root}: the number of classes is unknown; give --data.num-classes, or a classes.txt there")
    if names and len(names) != count:
        raise ValueError(f"{root}: {len(names)} names of classes, but --data.num-classes is {count}")
    classes = names or tuple(str(number) for number in range(count))
    rule = LabelRule(count, reduce_zero, ignore_value)
    return SegmentationImages(source, tuple(files[key] for key in keys), rule, classes)


def _folders(root: Path, train: bool) -> tuple[Path, Path]:
    """Where images and labels of a split are; where nothing is split, of all."""
    splits = _TRAINING if train else _VALIDATION
    pairs = [(i, a) for i in _IMAGES for a in _LABELS]
    candidates = [(root / i / s, root / a / s) for s in splits for i, a in pairs]
    candidates += [(root / s / i, root / s / a) for s in splits for i, a in pairs]
    every_split = (*_TRAINING, *_VALIDATION)
    if not any((root / i / s).is_dir() or (root / s / i).is_dir() for i in _IMAGES for s in every_split):
        candidates += [(root / i, root / a) for i, a in pairs]
    folders = next((pair for pair in candidates if pair[0].is_dir() and pair[1].is_dir()), None)
    if folders is None:
        split, short = ("training", "train") if train else ("validation", "val")
        raise ValueError(
            f"{root}: no {split} images with labels; looking for images/{split} with annotations/{split}, for "
            f"{short}/images with {short}/labels, or for images with labels"
        )
    return folders


def _class_names(root: Path) -> tuple[str, ...]:
    for name in _NAMES:
        if (root / name).is_file():
            lines = [line for line in os.fsdecode(read_file(str(root / name))).splitlines() if line.strip()]
            if name == "classes.txt":
                return tuple(line.strip() for line in lines)
            return tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines[1:])  # under a line of headings
    return ()


def builtin_segmentation(
    cache_dir: str | os.PathLike[str] | None, count: int, size: int, train: bool, seed: int = 0
) -> SegmentationImages:
    """Labelled scenes with their label maps: `scenes.SURFACES`, the ground among them.

    Training and validation scenes have different seeds and share no image.
    """
    seed = seed if train else VALIDATION_SEED + seed
    source = builtin.builtin_source(cache_dir, count, seed, size, labelled=True, label_maps=True)
    labels = tuple(Path(source.name(index)).with_suffix(".png") for index in range(count))
    return SegmentationImages(source, labels, LabelRule(len(scenes.SURFACES)), scenes.SURFACES)
