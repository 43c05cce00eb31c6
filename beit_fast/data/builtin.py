"""The built-in images: drawn scenes and crops of seven photographs, so that everything runs without a download.

A functional check, not a data set: loss and accuracy on it say nothing about ImageNet.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.scenes import (
    HUED,
    LABELLED,
    NUM_CLASSES,
    draw_scene,
    generator,
    labelled_class,
    render_labelled,
    render_scene,
)
from beit_fast.data.sources import FolderSource
from beit_fast.data.sources.source import default_cache_dir
from beit_fast.data.sources.writing import naming, write_text

__all__ = ["NOTICE", "NUM_CLASSES", "builtin_source", "render", "render_labelled"]

NOTICE = "built-in demo images (drawn scenes, crops of 7 photographs): a functional check, not comparable to ImageNet"
RENDERER = "dead-leaves-1"  # raise the number whenever the pixels of render() change
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "ihc", "retina", "rocket")
_QUALITY = 92


@cache
def _photograph(name: str) -> Any:
    from PIL import Image

    data = resources.files("beit_fast.data").joinpath("photographs", f"{name}.jpg").read_bytes()
    return Image.open(io.BytesIO(data)).convert("RGB")


def _photograph_crop(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    from PIL import Image

    photograph = _photograph(PHOTOGRAPHS[int(rng.integers(len(PHOTOGRAPHS)))])
    short = min(photograph.size)
    for _ in range(4):  # a window of plain sky is drawn again
        side = math.exp(rng.uniform(math.log(min(96, short)), math.log(short)))
        left, top = rng.uniform(0, photograph.width - side), rng.uniform(0, photograph.height - side)
        window = (left, top, left + side, top + side)
        pixels = np.asarray(photograph.resize((size, size), Image.Resampling.BICUBIC, box=window))
        if pixels[::4, ::4].std(axis=(0, 1)).max() > 12:
            break
    return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def render(index: int, seed: int, size: int, photograph_share: float = 0.2) -> NDArray[np.uint8]:
    """Draw image `index` of the set `seed`: uint8 (size, size, 3), a pure function of its arguments.

    `photograph_share` of the images are crops of the committed photographs, the others scenes. All sets crop the same
    seven photographs, so a held-out set that must share nothing with training takes share 0 (and another seed).
    """
    rng = generator(seed, index)
    if rng.random() < photograph_share:
        return _photograph_crop(rng, size)
    return draw_scene(rng, size).pixels


def builtin_source(
    cache_dir: str | os.PathLike[str] | None,
    count: int,
    seed: int = 0,
    size: int = 256,
    *,
    photograph_share: float = 0.2,
    labelled: bool = False,
    label_maps: bool = False,
    hues: bool = False,
    workers: int | None = None,
) -> FolderSource:
    """The first `count` built-in images of set `seed` as JPEG files of `size` pixels a side.

    They are drawn into a folder of `cache_dir` (None: `default_cache_dir()`) at the first call, with a progress line
    on stderr, and found there afterwards; a larger `count` draws only what is missing, and so does a cache with
    missing, empty or truncated files. Several processes may call at once: one draws, the others wait.
    `labelled=True` gives the 24-class scenes (class = 4 * shape + texture) and no photographs; with `label_maps=True`
    a PNG beside each holds the number of the surface (`scenes.SURFACES`) that each pixel shows. With `hues=True`
    the objects are coloured, and the class is 4 * shape + hue.

    ValueError where the folder holds something else than these images.
    """
    if (label_maps or hues) and not labelled:
        raise ValueError("builtin_source: only labelled scenes have label maps or hues")
    if label_maps and hues:
        raise ValueError("builtin_source: scenes with hues have no label maps")
    if count < 1 or size < 8 or seed < 0 or not 0 <= photograph_share <= 1:
        raise ValueError(
            f"builtin_source needs count >= 1, size >= 8, seed >= 0 and photograph_share in [0, 1]; "
            f"got {count}, {size}, {seed}, {photograph_share}"
        )
    share = 0.0 if labelled else photograph_share
    kind = f"photographs{round(100 * share)}"
    if labelled:
        kind = "segmented" if label_maps else "hues" if hues else "labelled"
    folder = Path(cache_dir or default_cache_dir()) / f"{RENDERER}-{kind}-seed{seed}-{size}px"
    manifest = {"renderer": RENDERER, "seed": seed, "size": size, "photograph_share": share, "labelled": labelled}
    if label_maps:
        manifest["label_maps"] = True
    if hues:
        manifest["hues"] = True
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        _check_manifest(folder, manifest | {"jpeg_quality": _QUALITY})
        missing = [
            index
            for index in range(count)
            if not _is_whole(path := folder / _file_name(index))
            or (label_maps and not path.with_suffix(".png").is_file())
        ]
        if missing:
            _draw_missing(folder, missing, manifest, workers)
    style = HUED if hues else LABELLED
    labels = np.array([labelled_class(index, seed, style) for index in range(count)], np.int32) if labelled else None
    return FolderSource(folder, (_file_name(index) for index in range(count)), labels)


def _file_name(index: int) -> str:
    return f"{index // 1000:04d}/{index:07d}.jpg"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system if this process dies
        yield


def _check_manifest(folder: Path, expected: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = json.loads(path.read_text())
        except (ValueError, RecursionError):
            manifest = None
        if manifest != expected:
            raise ValueError(f"{path} does not describe these images; delete the folder {folder} to draw them again")
    elif any(folder.glob("*/*.jpg")):
        raise ValueError(f"{folder} holds images but no manifest; delete the folder to draw them again")
    else:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        write_text(temporary, json.dumps(expected, indent=1) + "\n")
        temporary.replace(path)


def _is_whole(path: Path) -> bool:
    """A JPEG from its first marker to its last; what a full disk or a killed copy leaves behind is not."""
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(2)
            file.seek(-2, os.SEEK_END)
            return start == b"\xff\xd8" and file.read(2) == b"\xff\xd9"
    except OSError:
        return False


def _draw_missing(folder: Path, missing: list[int], manifest: dict[str, Any], workers: int | None) -> None:
    # Seconds of one core, roughly: below a few of them another process costs more than it brings.
    estimate = len(missing) * (0.004 + 2.5e-7 * manifest["size"] ** 2)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), 1 + int(estimate / 8))
    job = json.dumps({"folder": str(folder), **manifest})
    package_root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    helpers = []
    for worker in range(1, workers):
        command = [sys.executable, "-c", "from beit_fast.data.builtin import _help; _help()", job]
        helper = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True)
        assert helper.stdin is not None
        helper.stdin.write(" ".join(map(str, missing[worker::workers])))
        helper.stdin.close()
        helpers.append(helper)
    try:
        own = missing[::workers]
        started = shown = time.monotonic()
        for done, _ in enumerate(_draw(folder, own, manifest), 1):
            now = time.monotonic()
            if now - shown >= (0.5 if sys.stderr.isatty() else 5) or (done == len(own) and len(missing) > 50):
                shown = now
                left = (now - started) / done * (len(own) - done)
                _report(len(missing) * done // len(own), len(missing), left, done == len(own))
        failed = [helper.returncode for helper in helpers if helper.wait() != 0]
        if failed:
            raise RuntimeError(f"drawing the built-in images failed in another process (exit {failed[0]})")
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
                helper.wait()


def _report(done: int, total: int, seconds_left: float, last: bool) -> None:
    text = f"drawing the built-in images: {done}/{total}, {seconds_left:.0f} s left"
    if sys.stderr.isatty():
        print(f"\r{text:<72}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def _draw(folder: Path, indices: list[int], manifest: dict[str, Any]) -> Iterator[int]:
    from PIL import Image

    seed, size, share = manifest["seed"], manifest["size"], manifest["photograph_share"]
    for index in indices:
        path = folder / _file_name(index)
        path.parent.mkdir(exist_ok=True)
        if manifest["labelled"]:
            scene = render_scene(index, seed, size, HUED if manifest.get("hues") else LABELLED)
            pixels = scene.pixels
            if manifest.get("label_maps"):
                _save(Image.fromarray(scene.surfaces), path.with_suffix(".png"), format="PNG")
        else:
            pixels = render(index, seed, size, share)
        _save(Image.fromarray(pixels), path, format="JPEG", quality=_QUALITY)
        yield index


def _save(image: Any, path: Path, **options: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with naming(path):
            image.save(temporary, **options)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _help() -> None:
    """A helper process of `builtin_source`: the job in argv, the indices on stdin."""
    job = json.loads(sys.argv[1])
    for _ in _draw(Path(job["folder"]), [int(word) for word in sys.stdin.read().split()], job):
        pass
