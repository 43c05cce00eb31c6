"""What all loaders share: the request for a batch, and the numbers that images are normalised with."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of each channel of images in [0, 1]."""


class Request(NamedTuple):
    """One batch to make."""

    epoch: int
    positions: NDArray[np.int64]
    """(b,) places in the shuffled order of the epoch, each in [0, number of samples)."""
