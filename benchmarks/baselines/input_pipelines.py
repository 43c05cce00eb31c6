"""Input pipelines that others use for BEiT's pre-training, in one process, written from the description of the method.

Each gives, for a batch of JPEG files, the 224 px view (normalised), the 112 px view (in [0, 1]) and the masks.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from benchmarks.baselines.libraries import PythonBlockwiseMasking

Batch = tuple[Tensor, Tensor, Tensor]


def crop_window(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def jitter(images: list[Image.Image]) -> list[Image.Image]:
    steps = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    random.shuffle(steps)
    for step in steps:
        factor = random.uniform(0.6, 1.4)
        images = [step(image).enhance(factor) for image in images]
    return images


def to_tensor(image: Image.Image, scale: float, shift: float) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).mul_(scale).add_(shift)


def pil_views(path: str, jitter_first: bool) -> tuple[Tensor, Tensor]:
    """Official order: colour on the whole image, then the crop. Otherwise on the two small views."""
    with open(path, "rb") as file:
        image = Image.open(io.BytesIO(file.read())).convert("RGB")
    if jitter_first:
        (image,) = jitter([image])
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = crop_window(*image.size)
    views = [
        image.resize((224, 224), Image.Resampling.BICUBIC, box=box),
        image.resize((112, 112), Image.Resampling.LANCZOS, box=box),
    ]
    if not jitter_first:
        views = jitter(views)
    return to_tensor(views[0], 2, -1), to_tensor(views[1], 1, 0)


def pil_pipeline(files: Sequence[str], batch_size: int, jitter_first: bool) -> Callable[[], Batch]:
    masking = PythonBlockwiseMasking((14, 14), 75)

    def batch() -> Batch:
        views = [pil_views(random.choice(files), jitter_first) for _ in range(batch_size)]
        masks = torch.from_numpy(np.stack([masking() for _ in range(batch_size)]))
        return torch.stack([view[0] for view in views]), torch.stack([view[1] for view in views]), masks

    return batch


def dali_pipeline(files: Sequence[str], batch_size: int, threads: int, colour: bool) -> Callable[[], Batch]:
    """DALI end to end on the CPU; its contrast is about 128. Without `colour` the views stay uint8: less work."""
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(batch_size=batch_size, num_threads=threads, device_id=None, seed=0, prefetch_queue_depth=2)
    with pipe:
        encoded, _ = fn.readers.file(files=list(files), random_shuffle=True)
        crop = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        views: list[Any] = [
            fn.resize(crop, size=[224, 224], interp_type=types.INTERP_CUBIC, antialias=True),
            fn.resize(crop, size=[112, 112], interp_type=types.INTERP_LANCZOS3, antialias=True),
        ]
        if colour:
            factors = {name: fn.random.uniform(range=[0.6, 1.4]) for name in ("brightness", "contrast", "saturation")}
            flip = fn.random.coin_flip()
            views = [
                fn.crop_mirror_normalize(fn.color_twist(view, **factors), mirror=flip, mean=[mean], std=[std])
                for view, mean, std in zip(views, (127.5, 0.0), (127.5, 255.0), strict=True)
            ]
        pipe.set_outputs(*views)
    pipe.build()
    masking = PythonBlockwiseMasking((14, 14), 75)

    def batch() -> Batch:
        image, token_image = (torch.from_numpy(np.array(output.as_tensor())) for output in pipe.run())
        masks = torch.from_numpy(np.stack([masking() for _ in range(batch_size)]))
        return image, token_image, masks

    return batch
