"""Images as arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ArraySource:
    """Images in memory: uint8 (n, H, W, 3) or (n, H, W), or a list of such arrays of different sizes."""

    def __init__(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], labels: Sequence[int] | None = None):
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: {len(labels)} for {len(images)} images")
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes:
        """A binary PPM or PGM: a header before the pixels, so that arrays take the same way as files."""
        image = np.asarray(self._images[index])
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"images[{index}]: expected uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
        kind = "P5" if image.ndim == 2 else "P6"
        return f"{kind}\n{image.shape[1]} {image.shape[0]}\n255\n".encode() + image.tobytes()

    def name(self, index: int) -> str:
        return f"array:{index}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])
