"""What a path was found to hold, and what of it is left out: a run prints it first and keeps it as data.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_SHOWN = 5


@dataclass
class Contents:
    """What a source holds; names may bear surrogates for bytes that are no UTF-8."""

    path: str
    form: str
    """How the images are kept: "folders", "tar shards", ..."""
    images: int = 0
    shards: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    """Images of each class; those of training that have none here, too."""
    skipped: dict[str, list[Any]] = field(default_factory=dict)
    """By kind: how many were left out, then the names of the first."""
    notes: list[str] = field(default_factory=list)
    """What else has to be known, a sentence each."""

    def skip(self, kind: str, name: str) -> None:
        """Count something that is left out."""
        entry = self.skipped.setdefault(kind, [0])
        entry[0] += 1
        if len(entry) <= 3:
            entry.append(name)

    def skipped_counts(self) -> str:
        """What was left out instead of images, for the message that there are none."""
        most = sorted(self.skipped.items(), key=lambda item: -item[1][0])[:3]
        return ", ".join(f"{count} {kind.removeprefix('suffix ')}" for kind, (count, *_) in most) or "nothing"

    def lines(self, use: str = "") -> list[str]:
        """The same for people, a line each; `use` stands in front of the first."""
        shards = f" in {_count(self.shards, 'tar shard')}" if self.shards else ""
        classes = f", {_count(len(self.classes), 'class', 'classes')}" if self.classes else ""
        lines = [f"{use}{self.path}: {_count(self.images, 'image')}{shards}{classes}"]
        for kind, (count, *names) in self.skipped.items():
            more = ", ..." if count > len(names) else ""
            lines.append(f"  left out: {count:,} x {kind} ({', '.join(names)}{more})")
        if any(kind.startswith("suffix") for kind in self.skipped):
            lines.append(f"  {readable_suffixes()}")
        empty = [name for name, count in self.classes.items() if not count]
        if empty:
            more = ", ..." if len(empty) > _SHOWN else ""
            lines.append(f"  without an image: {_count(len(empty), 'class', 'classes')} "
                         f"({', '.join(empty[:_SHOWN])}{more})")  # fmt: skip
        return lines + [f"  {note}" for note in self.notes]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        skipped = {kind: {"count": count, "first": names} for kind, (count, *names) in self.skipped.items()}
        value: dict[str, Any] = {"path": self.path, "form": self.form, "images": self.images, "shards": self.shards}
        if self.classes:
            counts = self.classes.values()
            value |= {
                "classes": len(self.classes),
                "images_per_class": {"fewest": min(counts), "most": max(counts)},
                "classes_without_an_image": [name for name, count in self.classes.items() if not count],
            }
        return value | {"left_out": skipped, "notes": self.notes}


ARRAY_SUFFIX = ".npy"
"""Counts as an image only where nothing else does: beside images, arrays mostly are something else."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ARRAY_SUFFIX)


def readable_suffixes() -> str:
    """What is looked for, for a message."""
    return f"looking for {', '.join(IMAGE_SUFFIXES)}, in lower or upper case"


def _count(number: int, noun: str, nouns: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
