"""What the tasks on images share: how data are read, weights to start from, and the task around a loader."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from beit_fast.data.arrays.statistics import normalization_of
from beit_fast.data.loader import NORMALIZATION, Request
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import Contents, ImageSource, fingerprint
from beit_fast.train.config import RunConfig, at_least_1, free, local
from beit_fast.train.task import Task


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Images, and how they are read."""

    path: str | None = local(None, free=False)
    """Where the images are. None: built-in ones, drawn on this machine; a functional check."""
    cache_dir: str | None = local(None)
    """Where built-in images are kept; None: $BEIT_FAST_CACHE, or ~/.cache/beit_fast."""
    normalization: str = "imagenet"
    """Mean and standard deviation of the pixels: `imagenet`, `half` (0.5), or a file that `beit-fast stats` wrote;
    those of the pre-training."""
    channels: int | None = None
    """Channels that all images have; they then keep their depth (16 bits, floats; PNG, TIFF, .npy), and are decoded on
    the CPU. None: everything becomes RGB of 8 bits."""
    value_range: tuple[float, float] | None = None
    """Values of float and 32-bit pixels that are black and white; without it such images are refused. With
    --data.channels it holds for pixels of any type: 0 4095 for 12 bits."""
    max_bad_share: float = free(0.01)
    """Stop the run when more than this share of the images is unreadable; they are listed in bad_files.tsv."""
    decoder: Literal["auto", "dali", "pil"] = local("auto")
    """Who decodes images."""
    threads: int | None = local(None)
    """Threads that make views; None: the cores of this process, at most 8."""
    prefetch: int = local(2)
    """Batches made ahead."""

    def __post_init__(self) -> None:
        at_least_1("--data.channels", self.channels)
        if self.channels is not None and self.path is None:
            raise ValueError("--data.channels needs --data.path: the built-in images are RGB of 8 bits")

    @property
    def in_chans(self) -> int:
        """Channels that the model sees."""
        return 3 if self.channels is None else self.channels

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel; ValueError where the normalisation is none."""
        return normalization_of(self.normalization, self.channels)

    def loader_options(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments that every loader takes."""
        mean, std = self.mean_and_std()
        options = {
            "mean": mean, "std": std, "device": device, "decoder": self.decoder, "threads": self.threads,
            "prefetch": self.prefetch, "value_range": self.value_range,
        }  # fmt: skip
        return options if self.channels is None else options | {"channels": self.channels}

    def description(self) -> dict[str, Any]:
        """What a model has to know of its images: mean, std and, where they have their own, channels and range."""
        mean, std = self.mean_and_std()
        own = {"channels": self.channels, "value_range": self.value_range}
        return {"mean": mean, "std": std, **{name: value for name, value in own.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(RunConfig):
    """A run that starts from weights."""

    weights: str | None = local(None, free=False)
    """Weights to start from: a run folder (its newest checkpoint), or a file of the official code, timm or
    transformers."""
    scratch: bool = False
    """Start from random weights on purpose."""
    data: ImageDataConfig

    without_weights: ClassVar[str] = "this run starts from pre-trained weights; --scratch does not"
    """The error's advice where real data come without weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None and not self.scratch and self.data.path is not None and not self.dry_run:
            raise ValueError(f"--weights is missing: {self.without_weights}")
        if self.weights is not None and self.scratch:
            raise ValueError("--weights and --scratch contradict each other; give one of them")


class ImageTask(Task):
    """A task on the images of a `source`, which `build` opens together with `loader`."""

    source: ImageSource
    loader: Any
    """What makes the training batches; it and `others` are closed with the task."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.loader = None
        self.others: list[Any] = []
        self.bad_images: BadImages | None = None

    def screen(self, source: ImageSource, max_bad_share: float) -> BadImages:
        """Where unusable training images are counted and, during a run, listed."""
        folder = self.config.output_dir
        listing = folder / "bad_files.tsv" if folder.is_dir() else None
        self.source, self.bad_images = source, BadImages(len(source), listing, max_bad_share)
        return self.bad_images

    def num_samples(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {"data": fingerprint(self.source)}
        data = getattr(self.config, "data", None)
        if isinstance(data, ImageDataConfig) and data.normalization not in NORMALIZATION:
            identity["normalization"] = [list(values) for values in data.mean_and_std()]  # the file may change
        return identity

    def contents(self) -> dict[str, Contents]:
        held_out = [loader.source.contents for loader in self.others if loader.source is not self.source]
        return {"training": self.source.contents} | ({"validation": held_out[-1]} if held_out else {})

    def batches(self, requests: Iterator[Request]) -> Iterator[Any]:
        batches: Iterator[Any] = self.loader.batches(requests)
        return batches

    def counters(self) -> dict[str, float]:
        return {} if self.bad_images is None else {"bad_images": float(len(self.bad_images))}

    def close(self) -> None:
        for loader in (self.loader, *self.others):
            if loader is not None:
                loader.close()
