"""`beit-fast stats`: mean, standard deviation and range of the pixels of images, for --data.normalization."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from beit_fast.cli.options import errors_in_one_line, fail, parse
from beit_fast.data.arrays.statistics import Statistics, measure
from beit_fast.data.sources import open_training_source


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Mean and standard deviation of the pixels of images, as training reads them.

    beit-fast stats /data/scans --channels 1 --output scans.json
    """

    path: Positional[str] = ""
    """The images, as --data.path takes them."""
    output: Path | None = None
    """File to write, for --data.normalization; None prints only."""
    channels: int | None = None
    """As --data.channels: images of so many channels with their own depth; None: RGB of 8 bits."""
    value_range: tuple[float, float] | None = None
    """As --data.value-range: values that are black and white."""
    images: int = 1000
    """Images to look at, chosen by chance but always the same."""
    threads: int | None = None
    """Threads that read and decode; None: the cores of this process, at most 8."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images is unreadable."""


def stats_command(arguments: Sequence[str]) -> int:
    """Print the statistics and write them."""
    chosen = parse(StatsOptions(), arguments, "beit-fast stats")
    if not chosen.path:
        fail("stats takes images: beit-fast stats FOLDER --output stats.json", code=2)
    with errors_in_one_line():
        source = open_training_source(chosen.path)
        threads = chosen.threads or min(8, len(os.sched_getaffinity(0)))
        found = measure(
            source, chosen.path, chosen.channels, chosen.value_range, chosen.images, threads, chosen.max_bad_share
        )
        _print(found)
        scaled = found.value_range is not None or found.depth in ("uint8", "uint16")
        if chosen.output is not None and not scaled:
            raise ValueError(
                f"{found.depth} pixels have no scale of their own: give --value-range LOW HIGH, here and (as "
                "--data.value-range) to the training; nothing was written"
            )
        if chosen.output is not None:
            found.write(chosen.output)
            print(f"wrote {chosen.output}")
    return 0


def _print(found: Statistics) -> None:
    print(f"{found.data}: {found.images:,} images, {found.pixels:,} pixels, {found.channels} x {found.depth}")
    for name in ("mean", "std", "smallest", "largest"):
        values = " ".join(f"{value:.6g}" for value in getattr(found, name))
        print(f"  {name:<9} {values}" + (" (of [0, 1])" if name in ("mean", "std") else ""))
    ends = found.percentile_0_1, found.percentile_99_9
    print(f"  99.8 % of the values lie between {ends[0]:.6g} and {ends[1]:.6g}")
    if found.value_range is None and found.depth not in ("uint8",) and (
        found.depth != "uint16" or ends[1] < 65535 / 2
    ):  # fmt: skip
        print(f"  --data.value-range {ends[0]:.6g} {ends[1]:.6g} makes these black and white")
