"""Frozen features on disk: computed once, read at random."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.token_store import RowFile, create_row_file
from beit_fast.train.checkpoint.format import mib, write_json
from beit_fast.train.distributed.world import World


class FeatureCache:
    """A table (n, L, F) of features, one row per image of a source, with the labels, as .npy files in `folder`.

    `key` says what the features are of; a table found there that was completed under the same key is taken as it is.
    The processes of a run share the folder; each fills in the rows it computes. Their disk space is taken at once.

    Raises:
        OSError: the folder cannot be written, the disk is full, or a file is not what was written; one line names it.
    """

    def __init__(self, folder: Path, key: dict[str, Any], shape: tuple[int, int, int], world: World) -> None:
        self.folder, self.key, self.shape, self.world = folder, {**key, "shape": list(shape)}, shape, world
        self._marker = folder / "complete.json"
        self.complete = self._found()
        tables: dict[str, NDArray[Any]] = {
            "features": np.zeros((0, *shape[1:]), np.float32),
            "labels": np.zeros(0, np.int64),
        }
        headers = {name: _npy_header(table, shape[0]) for name, table in tables.items()}
        if not self.complete and world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self._marker.unlink(missing_ok=True)
            print(f"features: {shape[0]} images, {mib(4 * shape[0] * shape[1] * shape[2])} in {folder}", flush=True)
            unused = np.full(shape[0], -1, np.int64).tobytes()  # a row that no image fills is not used
            create_row_file(
                folder / "features.npy", headers["features"], len(headers["features"]) + 4 * int(np.prod(shape))
            )
            create_row_file(folder / "labels.npy", headers["labels"] + unused, len(headers["labels"]) + len(unused))
        world.barrier()
        self._features = RowFile(folder / "features.npy", len(headers["features"]), 4 * shape[1] * shape[2])
        self._labels = RowFile(folder / "labels.npy", len(headers["labels"]), 8)
        self.labels = self._read_labels()

    def _found(self) -> bool:
        try:
            return bool(json.loads(self._marker.read_text()) == json.loads(json.dumps(self.key)))
        except (OSError, ValueError, RecursionError):
            return False

    def _read_labels(self) -> NDArray[np.int64]:
        return _whole(self._labels, np.arange(self.shape[0])).view(np.int64)[:, 0]

    def fill(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Write (indices (b,), features (b, L, F), labels (b,)) of this process's share, then wait for the others."""
        for indices, features, labels in batches:
            for index, row, label in zip(
                indices.tolist(), features.float().cpu().numpy(), labels.tolist(), strict=True
            ):
                self._features.write(index, row.tobytes())
                self._labels.write(index, int(label).to_bytes(8, "little", signed=True))
        self._features.sync()
        self._labels.sync()
        self.world.barrier()
        self.labels = self._read_labels()
        if self.world.is_main:
            write_json(self._marker, self.key)
        self.complete = True

    def rows(self) -> NDArray[np.int64]:
        """The rows that hold features; the others are those of images that could not be used."""
        return np.flatnonzero(self.labels >= 0)

    def moments(self, chunk: int = 4096) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (L, F) float32 over all rows."""
        rows = self.rows()
        total = torch.zeros(self.shape[1:], dtype=torch.float64)
        squares = torch.zeros_like(total)
        for start in range(0, len(rows), chunk):
            part = self.take(rows[start : start + chunk])[0].double()
            total += part.sum(0)
            squares += part.square().sum(0)
        mean = total / len(rows)
        return mean.float(), (squares / len(rows) - mean.square()).clamp_min(0).sqrt().float()

    def take(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features (b, L, F) and labels (b,) of some rows, in memory."""
        features = _whole(self._features, rows).view(np.float32).reshape(len(rows), *self.shape[1:])
        return torch.from_numpy(features), torch.from_numpy(self.labels[rows])


def _npy_header(empty: NDArray[Any], rows: int) -> bytes:
    """The start of an .npy file of `rows` rows like those of `empty`."""
    file = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(empty) | {"shape": (rows, *empty.shape[1:])}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _whole(file: RowFile, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    found, whole = file.read(rows)
    if not whole.all():
        size = file.path.stat().st_size / 2**20
        raise OSError(
            f"{file.path} was cut off: it has {size:,.2f} MiB and lacks row {int(rows[~whole][0])}; delete the folder "
            f"{file.path.parent}, and the same command computes it again"
        )
    return found
