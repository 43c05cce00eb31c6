"""Images as arrays: in memory, or as the items of a PyTorch dataset."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.sources.contents import Contents


class ArraySource:
    """Images in memory: (n, H, W, C) or (n, H, W), or a list of such arrays of different sizes.

    What is not uint8 of one or three channels needs `channels` of the loader.
    """

    def __init__(self, images: Sequence[NDArray[Any]] | NDArray[Any], labels: Sequence[int] | None = None):
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: {len(labels)} for {len(images)} images")
        self._images = images
        self.contents = Contents("arrays", "arrays", len(images))
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes:
        return encode_array(self._images[index], f"images[{index}]")

    def name(self, index: int) -> str:
        return f"array:{index}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


class Items(Protocol):
    """What `DatasetSource` needs of a map-style `torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class DatasetSource:
    """The items of a map-style PyTorch dataset, e.g. one that reads LMDB: bytes, arrays, tensors or Pillow images.

    An item is an image or a tuple that begins with one. Images are encoded bytes of a file, an array (H, W) or
    (H, W, C), a tensor (C, H, W), or a Pillow image; a dataset must give the same item whenever it is asked,
    so it applies no random transform. Items are read in several threads at once.

    Args:
        dataset: with `__len__` and `__getitem__`.
        labels: the class of every item; None where there are none.
        name: stands in front of an item's number in messages and in the fingerprint of the data.
    """

    def __init__(self, dataset: Items, labels: Sequence[int] | None = None, name: str = "dataset") -> None:
        if labels is not None and len(labels) != len(dataset):
            raise ValueError(f"labels: {len(labels)} for {len(dataset)} images")
        self.dataset = dataset
        self.contents = Contents(name, "dataset", len(dataset))
        self._labels = labels
        self._name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> bytes:
        item = self.dataset[index]
        image = item[0] if isinstance(item, (tuple, list)) else item
        if isinstance(image, (bytes, bytearray, memoryview)):
            return bytes(image)
        if hasattr(image, "permute") and image.ndim == 3:  # a tensor (C, H, W)
            image = image.permute(1, 2, 0).squeeze(2) if image.shape[0] == 1 else image.permute(1, 2, 0)
        if hasattr(image, "getbands"):
            image = image.convert("L" if image.getbands() == ("L",) else "RGB")
        return encode_array(image, self.name(index))

    def name(self, index: int) -> str:
        return f"{self._name}:{index}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


def encode_array(image: Any, name: str) -> bytes:
    """A header before the pixels, so that arrays take the same way as files: PPM, PGM, or `.npy` for other kinds.

    Raises:
        ValueError: `image` is not (H, W) or (H, W, C) of numbers; the message begins with `name`.
    """
    array = np.asarray(image)
    if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        kind = "P5" if array.ndim == 2 else "P6"
        return f"{kind}\n{array.shape[1]} {array.shape[0]}\n255\n".encode() + array.tobytes()
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3):
        raise ValueError(f"{name}: expected numbers (H, W) or (H, W, C), got {array.dtype} {array.shape}")
    buffer = io.BytesIO()
    np.save(buffer, array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    return buffer.getvalue()
