"""Reading screened images of a source ahead of their use, in the order of an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from beit_fast.data.sampling import epoch_order
from beit_fast.data.screening import BadImages, Header, Rejection, read_screened
from beit_fast.data.sources import ImageSource


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that passed the screening."""

    position: int
    """Its place in the order of the epoch."""
    index: int
    """Its place in the source."""
    data: bytes
    header: Header


class ScreenedReader:
    """Reads samples by their place in an epoch's order, in threads; reports bad images to `bad_images`.

    A bad image is replaced by the sample at the next place, (position + 1) modulo the length, and so on: the
    replacement does not depend on the batch either.
    """

    def __init__(self, source: ImageSource, seed: int, bad_images: BadImages, threads: int) -> None:
        if len(source) == 0:
            raise ValueError("source: no images")
        self.source, self.seed, self.bad_images = source, seed, bad_images
        # Reading waits for disks and networks: more threads than cores.
        self._pool = ThreadPoolExecutor(max(8, threads), thread_name_prefix="beit_fast-read")

    def start(self, epoch: int, positions: Iterable[int]) -> list[Future[Sample]]:
        """Begin to read the samples at `positions`; take them with `.result()`."""
        return [self._pool.submit(self.find, epoch, position) for position in positions]

    def find(self, epoch: int, position: int) -> Sample:
        """The first usable sample at or after a place of the epoch's order.

        Raises:
            TooManyBadImages: see `BadImages`.
            ValueError: not one image can be used.
        """
        length = len(self.source)
        for step in range(length):
            place = (position + step) % length
            index = int(epoch_order([place], length, self.seed, epoch)[0])
            found = self.read(index)
            if found is not None:
                return Sample(place, index, *found)
        raise ValueError("source: not one of its images can be used")

    def after(self, epoch: int, sample: Sample, reason: str) -> Sample:
        """The replacement of a sample that passed the screening but cannot be decoded."""
        self.bad_images.add(self.source.name(sample.index), reason)
        return self.find(epoch, (sample.position + 1) % len(self.source))

    def read(self, index: int) -> tuple[bytes, Header] | None:
        """Bytes and header of image `index`; None, and reported, where it is bad."""
        found = read_screened(self.source, index)
        self.bad_images.looked_at(1)
        if isinstance(found, Rejection):
            self.bad_images.add(self.source.name(index), found.reason)
            return None
        return found

    def start_reading(self, indices: Iterable[int]) -> list[Future[tuple[bytes, Header] | None]]:
        """Begin to read images by their place in the source; None for a bad one."""
        return [self._pool.submit(self.read, index) for index in indices]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
