"""Images that tests write into folders: drawn scenes with and without classes, and scans of one channel."""

import numpy as np
from PIL import Image

from beit_fast.data import builtin


def write_scenes(folder, count, name="{:03d}.jpg"):
    """The first `count` built-in scenes of seed 5, 48 x 48; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(builtin.render(index, seed=5, size=48)).save(folder / name.format(index))
    return folder


def write_class_folders(root, classes, train, val, seed=5, size=32):
    """root/train/CLASS and root/val/CLASS with so many drawn scenes each; returns root."""
    for split, count in (("train", train), ("val", val)):
        for place, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels, _ = builtin.render_labelled(10 * place + number, seed, size)
                Image.fromarray(np.ascontiguousarray(pixels)).save(root / split / name / f"{number}.jpg")
    return root


def write_kinds(root, count, val=4):
    """Three classes of scenes that differ, `count` of each, the first `val` of them under val; returns root."""
    counts, index = {}, 0
    while min(counts.values(), default=0) < count or len(counts) < 3:
        pixels, label = builtin.render_labelled(index, 0, 80)
        index += 1
        if label < 3 and counts.get(label, 0) < count:
            number = counts[label] = counts.get(label, 0) + 1
            folder = root / ("val" if number <= val else "train") / f"kind_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
    return root


def scan(label, rng, shape, level, amplitude, noise, most=2**16 - 1):
    """Grey stripes of 16 bits at a random angle and phase: wide ones of class 0, narrow ones of class 1."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    angle = rng.uniform(0, np.pi)
    wave = np.sin((0.3, 1.0)[label] * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 6))
    return np.clip(level + amplitude * wave + rng.normal(0, noise, shape), 0, most).astype(np.uint16)


def write_scans(root, unlabelled, count, train, val, rng, draw):
    """root/UNLABELLED with `count` TIFFs, of both classes in turn, and root/labelled/{train,val}/{a,b}."""
    parts = (("train", train), ("val", val))
    folders = {unlabelled: count} | {f"labelled/{part}/{c}": n for part, n in parts for c in "ab"}
    for folder, number_of in folders.items():
        (root / folder).mkdir(parents=True)
        for number in range(number_of):
            label = number % 2 if folder == unlabelled else "ab".index(folder[-1])
            Image.fromarray(draw(label, rng)).save(root / folder / f"{number:03d}.tif")
