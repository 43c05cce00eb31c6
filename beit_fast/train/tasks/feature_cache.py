"""Frozen features on disk: computed once, read at random."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.train.checkpoint.format import mib
from beit_fast.train.distributed.world import World


class FeatureCache:
    """A table (n, L, F) of features, one row per image of a source, with the labels, memory-mapped in `folder`.

    `key` says what the features are of; a table found there that was completed under the same key is taken as it is.
    The processes of a run share the folder; each fills in the rows it computes.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, key: dict[str, Any], shape: tuple[int, int, int], world: World) -> None:
        self.folder, self.key, self.world = folder, {**key, "shape": list(shape)}, world
        self._marker = folder / "complete.json"
        self.complete = self._found()
        mode: Any = "r"
        if not self.complete:
            mode = "r+"
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                self._marker.unlink(missing_ok=True)
                print(f"features: {shape[0]} images, {mib(4 * shape[0] * shape[1] * shape[2])} in {folder}", flush=True)
                self._open("w+", shape)
        world.barrier()
        self.features, self.labels = self._open(mode, shape)

    def _open(self, mode: Any, shape: tuple[int, int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        features = np.lib.format.open_memmap(self.folder / "features.npy", mode=mode, dtype=np.float32, shape=shape)
        labels = np.lib.format.open_memmap(self.folder / "labels.npy", mode=mode, dtype=np.int64, shape=shape[:1])
        if mode == "w+":
            labels[:] = -1  # a row that no image fills is not used
            labels.flush()
        return features, labels

    def _found(self) -> bool:
        try:
            return bool(json.loads(self._marker.read_text()) == json.loads(json.dumps(self.key)))
        except (OSError, ValueError):
            return False

    def fill(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Write (indices (b,), features (b, L, F), labels (b,)) of this process's share, then wait for the others."""
        for indices, features, labels in batches:
            self.features[indices.numpy()] = features.float().cpu().numpy()
            self.labels[indices.numpy()] = labels.cpu().numpy()
        self.features.flush()  # type: ignore[attr-defined]
        self.labels.flush()  # type: ignore[attr-defined]
        self.world.barrier()
        if self.world.is_main:
            self._marker.write_text(json.dumps(self.key) + "\n")
        self.complete = True

    def rows(self) -> NDArray[np.int64]:
        """The rows that hold features; the others are those of images that could not be used."""
        return np.flatnonzero(self.labels >= 0)

    def moments(self, chunk: int = 4096) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (L, F) float32 over all rows."""
        rows = self.rows()
        total = torch.zeros(self.features.shape[1:], dtype=torch.float64)
        squares = torch.zeros_like(total)
        for start in range(0, len(rows), chunk):
            part = torch.from_numpy(self.features[rows[start : start + chunk]]).double()
            total += part.sum(0)
            squares += part.square().sum(0)
        mean = total / len(rows)
        return mean.float(), (squares / len(rows) - mean.square()).clamp_min(0).sqrt().float()

    def take(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features (b, L, F) and labels (b,) of some rows, in memory."""
        return torch.from_numpy(self.features[rows]), torch.from_numpy(self.labels[rows])
