"""Reading screened images of a source ahead of their use, in the order of an epoch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.arrays.decoding import ArrayDecoder
from beit_fast.data.decoding import Decoder, PilDecoder, Windows
from beit_fast.data.sampling import epoch_order
from beit_fast.data.screening import BadImages, Header, Rejection, screen
from beit_fast.data.sources import FolderSource, ImageSource

NOTHING_USABLE = "source: not one of its images can be used"


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that passed the screening."""

    position: int
    """In the order of the epoch; -1 where there is none."""
    index: int
    """In the source."""
    data: bytes
    header: Header


class Kind(NamedTuple):
    """What all images of a source have in common where they keep their channels and their depth."""

    channels: int
    depth: str
    example: str
    """Name of an image of this kind."""

    def check(self, name: str, header: Header) -> None:
        """ValueError, naming both images, where this one is of another kind."""
        if (header.channels, header.depth) != (self.channels, self.depth):
            raise ValueError(
                f"{name} has {_kind_of(header)}, {self.example} has {self.channels} x {self.depth}: with "
                "--data.channels all images must be of one kind; convert them, or leave --data.channels out to read "
                "everything as RGB of 8 bits"
            )


def _kind_of(header: Header) -> str:
    return f"{header.channels} x {header.depth}"


def common_kind(source: ImageSource, channels: int, value_range: tuple[float, float] | None = None) -> Kind:
    """The kind of the first usable image of a source.

    Raises:
        ValueError: it has other channels, or its pixels have no scale of their own and no range is given.
    """
    if channels < 1:
        raise ValueError(f"--data.channels is {channels}, it must be at least 1")
    for index in range(len(source)):
        screened = read_screened(source, index)
        if isinstance(screened, Rejection):
            continue
        name, header = source.name(index), screened[1]
        if header.channels != channels:
            axes = ", of an array (H, W, C)" if header.format == "npy" else ""
            raise ValueError(
                f"{name} has {_kind_of(header)}{axes}, --data.channels is {channels}; give --data.channels "
                f"{header.channels}, or leave it out to read everything as RGB of 8 bits"
            )
        if header.depth not in ("uint8", "uint16") and value_range is None:
            raise ValueError(
                f"{name} has {_kind_of(header)}, which has no scale of its own: --data.value-range LOW HIGH says which "
                "values are black and white (beit-fast stats prints what occurs)"
            )
        return Kind(channels, header.depth, name)
    raise ValueError(NOTHING_USABLE)


def decode(decoder: Decoder | ArrayDecoder, samples: Sequence[Sample], windows: Windows) -> list[Any]:
    """Decode the windows (len(samples), 4) of samples; a Rejection for what cannot be."""
    if not samples:
        return []
    return decoder.decode([sample.data for sample in samples], [sample.header for sample in samples], windows)


class ScreenedReader:
    """Reads samples by their position in an epoch's order, in threads; reports bad images to `bad_images`.

    A bad image is replaced by the sample at the next position, (position + 1) modulo the length, and so on: the
    replacement does not depend on the batch either.

    With a `kind`, an image of another kind ends the run: it is nothing that may be left out.

    Raises:
        ValueError: an empty source.
    """

    def __init__(
        self, source: ImageSource, seed: int, bad_images: BadImages, threads: int, kind: Kind | None = None
    ) -> None:
        if len(source) == 0:
            raise ValueError("source: no images")
        self.source, self.seed, self.bad_images, self.kind = source, seed, bad_images, kind
        # Reading waits for disks and networks: more threads than cores.
        self._threads = max(8, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="beit_fast-read")

    def start(self, epoch: int, positions: NDArray[np.integer]) -> Iterator[Sample]:
        """Begin to read the samples at `positions` (b,); iterate to wait for them.

        Raises:
            ValueError: no positions.
        """
        if positions.ndim != 1 or len(positions) == 0:
            raise ValueError(f"positions must be a row of at least one, got shape {positions.shape}")
        # A task per image would cost as much as reading it from the page cache.
        parts = np.array_split(positions, min(len(positions), 2 * self._threads))
        futures = [self._pool.submit(self._find_all, epoch, part.tolist()) for part in parts]
        return chain.from_iterable(future.result() for future in futures)

    def _find_all(self, epoch: int, positions: list[int]) -> list[Sample]:
        return [self.find(epoch, position) for position in positions]

    def find(self, epoch: int, position: int) -> Sample:
        """Return the first usable sample at or after a position of the epoch's order.

        Raises:
            TooManyBadImages: see `BadImages`.
            ValueError: not one image can be used.
        """
        length = len(self.source)
        for step in range(length):
            tried = position if step == 0 else (position + step) % length  # a first position out of range is an error
            index = int(epoch_order([tried], length, self.seed, epoch)[0])
            sample = self.read(index, tried)
            if sample is not None:
                return sample
        raise ValueError(NOTHING_USABLE)

    def after(self, epoch: int, sample: Sample, reason: str) -> Sample:
        """Return the replacement of a sample that passed the screening but cannot be decoded."""
        self.bad_images.add(self.source.name(sample.index), reason)
        return self.find(epoch, (sample.position + 1) % len(self.source))

    def read(self, index: int, position: int = -1) -> Sample | None:
        """Return image `index`, found at `position` of an order; None, and reported, where it is bad."""
        screened = read_screened(self.source, index)
        self.bad_images.looked_at(1)
        if isinstance(screened, Rejection):
            self.bad_images.add(self.source.name(index), screened.reason)
            return None
        if self.kind is not None:
            self.kind.check(self.source.name(index), screened[1])
        return Sample(position, index, *screened)

    def read_all(self, indices: Sequence[int]) -> Iterator[Sample | None]:
        """Read images by their index in the source; None for a bad one."""
        return self._pool.map(self.read, indices)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def read_picture(
    path: Path, value_range: tuple[float, float] | None = None, channels: int | None = None
) -> Any | Rejection:
    """Read a whole image file as the loaders do: uint8 (H, W, 3), or float32 (H, W, `channels`) in [0, 1]."""
    source = FolderSource(Path(), [os.fspath(path)])
    screened = read_screened(source, 0)
    if isinstance(screened, Rejection):
        return screened
    data, header = screened
    window = np.array([(0, 0, header.height, header.width)], np.int32)
    if channels is None:
        return PilDecoder(value_range).decode([data], [header], window)[0]
    try:
        common_kind(source, channels, value_range)
    except ValueError as error:
        return Rejection(str(error))
    return ArrayDecoder("pil", 1, value_range).decode([data], [header], window)[0]


def read_screened(source: ImageSource, index: int) -> tuple[bytes, Header] | Rejection:
    """Read and screen one image of a source; an image that cannot be read is rejected too."""
    try:
        data = source.read(index)
    except OSError as error:
        return Rejection(f"cannot be read: {error.strerror or error}")
    header = screen(data)
    return header if isinstance(header, Rejection) else (data, header)
