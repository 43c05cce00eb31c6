"""Mean and standard deviation of the pixels of a source, and the names and files that give them to a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beit_fast.data.arrays.decoding import ArrayDecoder
from beit_fast.data.decoding import Decoder, open_decoder
from beit_fast.data.loader import NORMALIZATION
from beit_fast.data.reading import ScreenedReader, common_kind, decode
from beit_fast.data.sampling import epoch_order
from beit_fast.data.screening import BadImages, Rejection
from beit_fast.data.sources import ImageSource

MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]
_PIXELS_KEPT = 4096
"""Pixels of an image from which the percentiles are taken."""


def normalization_of(name: str, channels: int | None = None) -> MeanAndStd:
    """Mean and standard deviation of each channel, of images in [0, 1].

    Of a name they are those of three channels; one channel takes their means, others take them in turn, as the patch
    embedding of three channels is fitted to others (`models.load_checkpoint`).

    Args:
        name: "imagenet", "half", or a file that `beit-fast stats` wrote (any JSON with `mean` and `std`).
        channels: of the images; None: 3.

    Raises:
        ValueError: there is no such name or file, or it is of another number of channels.
    """
    count = channels or 3
    if name in NORMALIZATION:
        values = NORMALIZATION[name]
        if count == 1:
            return tuple((sum(v) / len(v),) for v in values)  # type: ignore[return-value]
        return tuple(tuple(v[channel % 3] for channel in range(count)) for v in values)  # type: ignore[return-value]
    try:
        content = json.loads(Path(name).read_text())
        mean, std = (tuple(float(value) for value in content[key]) for key in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError(
            f"--data.normalization {name}: no file of `beit-fast stats` (JSON with mean and std), and not one of "
            f"{', '.join(NORMALIZATION)}; write one with beit-fast stats"
        ) from None
    if len(mean) != count or len(std) != count or min(std) <= 0:
        raise ValueError(
            f"--data.normalization {name}: {len(mean)} means, {len(std)} deviations, not {count} each; make it anew "
            f"with --channels {count}"
        )
    return mean, std


@dataclass(frozen=True)
class Statistics:
    """What the pixels of some images are like; values as stored, `mean` and `std` after scaling to [0, 1]."""

    data: str
    images: int
    pixels: int
    channels: int
    depth: str
    value_range: tuple[float, float] | None
    """Values that become 0 and 1; None: 0 and the largest of the type. Float images without one are not scaled."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    smallest: tuple[float, ...]
    largest: tuple[float, ...]
    percentile_0_1: float
    percentile_99_9: float

    def write(self, path: Path) -> None:
        """As JSON, to be given to `--data.normalization`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def measure(
    source: ImageSource, data: str, channels: int | None, value_range: tuple[float, float] | None = None,
    images: int = 1000, threads: int = 1, max_bad_share: float = 0.01,
) -> Statistics:  # fmt: skip
    """Look at up to `images` of a source, chosen by chance but always the same.

    Args:
        source: the images.
        data: where they are, for the record.
        channels: that they must have; None: all become RGB of 8 bits, as in training without --data.channels.
        value_range: as of `ArrayDecoder`; where there is none, float and signed pixels are measured as they are.

    Raises:
        ValueError: images of other channels or of several depths.
        TooManyBadImages: see `BadImages`.
    """
    decoder: Decoder | ArrayDecoder = open_decoder("auto", threads, value_range)
    if channels is not None:
        decoder = ArrayDecoder("auto", threads, value_range, scaled=False)
    bad = BadImages(min(images, len(source)), None, max_bad_share)
    reader = ScreenedReader(source, 0, bad, threads)
    count, total, squares = 0, np.zeros(channels or 3), np.zeros(channels or 3)
    low, high, kept, used = np.full(channels or 3, np.inf), np.full(channels or 3, -np.inf), [], 0
    # whatever the scale: it is what is looked for
    kind = None if channels is None else common_kind(source, channels, value_range or (0.0, 1.0))
    try:
        chosen = np.sort(epoch_order(np.arange(min(images, len(source))), len(source), 0, 0))
        for sample in reader.read_all(chosen.tolist()):
            if sample is None:
                continue
            name, header = source.name(sample.index), sample.header
            if kind is not None:
                kind.check(name, header)
            pixels = decode(decoder, [sample], np.array([(0, 0, header.height, header.width)], np.int32))[0]
            if isinstance(pixels, Rejection):
                bad.add(name, pixels.reason)
                continue
            rows = np.asarray(pixels, np.float64).reshape(-1, channels or 3)
            rows = rows[np.isfinite(rows).all(1)]
            if not len(rows):
                continue
            low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
            kept.append(rows[:: max(1, len(rows) // _PIXELS_KEPT)].ravel())
            scaled = _scaled(rows, kind.depth if kind else "uint8", value_range)
            count, used = count + len(rows), used + 1
            total += scaled.sum(0)
            squares += np.square(scaled).sum(0)
    finally:
        reader.close()
    if not count:
        raise ValueError(f"{data}: not one of {len(chosen)} images can be used; bad files are named above")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    ends = np.percentile(np.concatenate(kept), [0.1, 99.9])
    return Statistics(
        data, used, count, channels or 3, kind.depth if kind else "uint8", value_range, _tuple(mean), _tuple(std),
        _tuple(low), _tuple(high), float(ends[0]), float(ends[1]),
    )  # fmt: skip


def _scaled(rows: np.ndarray, depth: str, value_range: tuple[float, float] | None) -> np.ndarray:
    full = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}.get(depth)
    low, high = value_range or full or (0.0, 1.0)
    return rows if value_range is None and full is None else np.clip((rows - low) / (high - low), 0, 1)


def _tuple(values: Sequence[Any] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
