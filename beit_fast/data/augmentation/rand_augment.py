"""RandAugment (Cubuk et al., 2020) as BEiT's fine-tuning sets it, timm's `rand-m9-mstd0.5-inc1`, through DALI.

What is drawn is timm's: two of 15 operations per view, with replacement, each carried out with probability 0.5 at a
level from N(9, 0.5) clipped to [0, 10], its sign (where it has one) by a fair coin; but from the sample's key, so it
does not depend on the batch. The photometric operations are those of `nvidia.dali.auto_aug.augmentations`, the
geometric ones are one `warp_affine`. Measured against timm's own on photographs, in levels of 255 (mean absolute
difference at level 7.3, 224 pixels; tests):

- solarize, solarize_add, invert, posterize: none; but at level 10 posterize keeps one bit, where timm left a black
  image (and fails with Pillow 13).
- auto_contrast, brightness, contrast, color, sharpness: 0.3 to 0.6 (rounding; sharpness also filters the border
  pixels, which Pillow leaves alone).
- equalize: 5.8, because DALI follows OpenCV's formula and timm Pillow's.
- rotate, shear, translate: 0.4 to 0.6 against timm with linear interpolation, 0.9 to 1.6 against bicubic, which timm
  takes in BEiT's fine-tuning and DALI does not have.
- What moves in from outside is gray 128; timm fills with the normalisation's mean, (124, 116, 104) for ImageNet's.
- The flip comes after RandAugment instead of before it. Every signed operation is symmetric, so the distribution of
  views is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from beit_fast.data.decoding import require_dali
from beit_fast.data.sampling import uniforms

OPERATIONS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_FILL = 128.0
_LAST_LEVEL = 10.0


class AugmentPlan(NamedTuple):
    """What is done to the views of a batch, one column per layer."""

    operations: NDArray[np.int64]
    """(B, n) places in `OPERATIONS`, -1 where nothing is done."""
    levels: NDArray[np.float64]
    """(B, n) strength in [0, 10]."""
    signs: NDArray[np.float64]
    """(B, n) +1 or -1."""


@dataclass(frozen=True)
class RandAugment:
    """Strength of RandAugment.

    Raises:
        ValueError: a magnitude outside [0, 10], or a negative number of operations.
    """

    magnitude: float = 9.0
    """Mean level of the operations, of 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the level."""
    num_operations: int = 2
    """Operations drawn per view."""
    probability: float = 0.5
    """Probability that a drawn operation is carried out."""

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= _LAST_LEVEL or self.magnitude_std < 0:
            raise ValueError(
                f"RandAugment: magnitude must be in [0, 10] and magnitude_std at least 0, got {self.magnitude}, "
                f"{self.magnitude_std}"
            )
        if self.num_operations < 0 or not 0 <= self.probability <= 1:
            raise ValueError(
                f"RandAugment: needs num_operations >= 0 and probability in [0, 1], got {self.num_operations}, "
                f"{self.probability}"
            )

    def sample(self, keys: ArrayLike) -> AugmentPlan:
        """The plan for views with the `keys` int64 (B,)."""
        u = uniforms(keys, 5 * self.num_operations, stream=2).reshape(-1, self.num_operations, 5)
        drawn = (u[..., 0] * len(OPERATIONS)).astype(np.int64)
        normal = np.sqrt(-2.0 * np.log1p(-u[..., 2])) * np.cos(2.0 * np.pi * u[..., 3])
        return AugmentPlan(
            np.where(u[..., 1] < self.probability, drawn, -1),
            np.clip(self.magnitude + self.magnitude_std * normal, 0.0, _LAST_LEVEL),
            np.where(u[..., 4] < 0.5, 1.0, -1.0),
        )


class _Parameters(NamedTuple):
    """What the graph needs for one operation; each leaf of it reads one of the three."""

    leaf: int
    number: float = 0.0
    kernel: NDArray[Any] = np.zeros((3, 3), np.float32)
    matrix: NDArray[np.float32] = np.zeros((2, 3), np.float32)


_BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_SAME = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


def parameters(operation: str, level: float, sign: float, size: int) -> _Parameters:
    """timm's arguments of an operation at `level` (its increasing-severity set) on a view of `size` pixels."""
    share, factor = level / _LAST_LEVEL, 1.0 + sign * 0.9 * level / _LAST_LEVEL
    if operation in ("auto_contrast", "equalize"):
        return _Parameters(("auto_contrast", "equalize").index(operation))
    if operation == "posterize":
        bits = max(4 - int(share * 4), 1)
        return _Parameters(2, 256 - 2 ** (8 - bits))
    if operation in ("solarize", "invert"):
        return _Parameters(3, 256 - int(share * 256) if operation == "solarize" else 0)
    if operation == "solarize_add":
        return _Parameters(4, int(share * 110))
    if operation in ("color", "contrast", "brightness"):
        return _Parameters(5 + ("color", "contrast", "brightness").index(operation), factor)
    if operation == "sharpness":
        return _Parameters(8, kernel=factor * _SAME + (1.0 - factor) * _BLUR)
    return _Parameters(9, matrix=_matrix(operation, sign * share, size))


def _matrix(operation: str, share: float, size: int) -> NDArray[np.float32]:
    """Output to input coordinates (x, y), pixel centres at one half."""
    matrix = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    if operation == "rotate":
        cos, sin, middle = math.cos(math.radians(30 * share)), math.sin(math.radians(30 * share)), size / 2
        matrix[:] = [[cos, -sin, middle * (1 - cos + sin)], [sin, cos, middle * (1 - cos - sin)]]
    elif operation == "shear_x":
        matrix[0, 1] = 0.3 * share
    elif operation == "shear_y":
        matrix[1, 0] = 0.3 * share
    else:
        matrix[("translate_x", "translate_y").index(operation), 2] = 0.45 * share * size
    return matrix


class Augmenter:
    """Carries out plans on views uint8 (B, S, S, 3) in memory, through one DALI graph on the CPU. Not thread-safe.

    The graph is built when first used. ModuleNotFoundError, with the way out, where DALI is missing.
    """

    def __init__(self, threads: int) -> None:
        require_dali()
        self.threads = threads
        self._pipe: Any = None
        self._capacity = 0

    def apply(self, views: Tensor, plan: AugmentPlan) -> Tensor:
        """Augments `views` in place and returns them."""
        size, pixels = views.shape[1], views.numpy()  # NumPy copies whole rows, torch indexes byte by byte
        for layer in range(plan.operations.shape[1]):
            rows = np.flatnonzero(plan.operations[:, layer] >= 0)
            if not len(rows):
                continue
            chosen = [
                parameters(OPERATIONS[int(operation)], float(level), float(sign), size)
                for operation, level, sign in zip(
                    plan.operations[rows, layer], plan.levels[rows, layer], plan.signs[rows, layer], strict=True
                )
            ]
            pixels[rows] = self._run(pixels[rows], chosen, len(views))
        return views

    def _run(self, views: NDArray[np.uint8], chosen: list[_Parameters], capacity: int) -> NDArray[np.uint8]:
        if self._pipe is None or capacity > self._capacity:
            self._build(capacity)
        self._pipe.feed_input("views", views)
        self._pipe.feed_input("leaf", np.array([p.leaf for p in chosen], np.int32))
        self._pipe.feed_input("number", np.array([p.number for p in chosen], np.float32))
        self._pipe.feed_input("kernel", np.stack([p.kernel for p in chosen]).astype(np.float32))
        self._pipe.feed_input("matrix", np.stack([p.matrix for p in chosen]))
        (output,) = self._pipe.run()
        return np.array(output.as_array())

    def _build(self, capacity: int) -> None:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.auto_aug import augmentations
        from nvidia.dali.auto_aug.core import select
        from nvidia.dali.pipeline import do_not_convert

        def byte(number: Any) -> Any:
            return fn.cast(number, dtype=types.UINT8)

        # Their undecorated functions: the decorator would look the arguments up in a table of rounded levels.
        leaves: list[Callable[..., Any]] = [
            lambda x, number, kernel, matrix: augmentations.auto_contrast.op(x, None),
            lambda x, number, kernel, matrix: fn.equalize(x),
            lambda x, number, kernel, matrix: augmentations.posterize.op(x, byte(number)),
            lambda x, number, kernel, matrix: augmentations.solarize.op(x, number),
            lambda x, number, kernel, matrix: augmentations.solarize_add.op(x, byte(number)),
            lambda x, number, kernel, matrix: augmentations.color.op(x, number),
            lambda x, number, kernel, matrix: augmentations.contrast.op(x, number),
            lambda x, number, kernel, matrix: augmentations.brightness.op(x, number),
            lambda x, number, kernel, matrix: fn.filter(x, kernel),
            lambda x, number, kernel, matrix: fn.warp_affine(x, matrix=matrix, fill_value=_FILL),
        ]

        @pipeline_def(
            batch_size=capacity,
            num_threads=self.threads,
            device_id=None,
            enable_conditionals=True,
            prefetch_queue_depth=1,
        )
        def graph() -> Any:
            views = fn.external_source(name="views", dtype=types.UINT8, ndim=3, layout="HWC")
            leaf = fn.external_source(name="leaf", dtype=types.INT32, ndim=0)
            number = fn.external_source(name="number", dtype=types.FLOAT, ndim=0)
            kernel = fn.external_source(name="kernel", dtype=types.FLOAT, ndim=2)
            matrix = fn.external_source(name="matrix", dtype=types.FLOAT, ndim=2)
            # Without `do_not_convert` DALI rewrites the leaves' source code too: 15 s instead of a quarter.
            return select([do_not_convert(f) for f in leaves], leaf, views, number, kernel, matrix)

        self._pipe, self._capacity = None, capacity
        pipe = graph()
        pipe.build()
        self._pipe = pipe
