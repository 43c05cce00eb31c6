"""Images in parquet files as Hugging Face writes them: a column of encoded images, optionally a column of labels.

A row cannot be read by itself: parquet keeps rows in compressed groups of some hundred, and training reads them in
random order. So each file is unpacked once into a tar shard in the cache folder, which takes the same space again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beit_fast.data.sources.contents import IMAGE_SUFFIXES
from beit_fast.data.sources.shards import TarSource
from beit_fast.data.sources.source import default_cache_dir, is_image

_ROWS_AT_ONCE = 64


class ParquetSource(TarSource):
    """Rows of parquet files in the order of the files; `name(i)` gives file, row and the name that the row carries.

    Args:
        files: the parquet files.
        cache_dir: where they are unpacked; None: $BEIT_FAST_CACHE, or ~/.cache/beit_fast.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: a file is damaged, has no column of images, or the disk lacks the space to unpack it.
    """

    def __init__(self, files: Sequence[Path], cache_dir: str | os.PathLike[str] | None = None) -> None:
        folder = Path(cache_dir or default_cache_dir()) / "parquet"
        folder.mkdir(parents=True, exist_ok=True)
        self.files = list(files)
        super().__init__([_unpacked(path, folder) for path in self.files])
        self.contents.path, self.contents.form = str(self.files[0].parent), "parquet files"

    def name(self, index: int) -> str:
        shard, _, member = super().name(index).rpartition(".tar:")
        row, _, name = member.partition("/")
        return f"{self.files[self.shards.index(Path(shard + '.tar'))]}:row {int(row)}/{name}"


def _unpacked(path: Path, folder: Path) -> Path:
    """The tar shard of a parquet file, made where there is none of this very file."""
    state = path.stat()
    key = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    shard = folder / f"{path.stem}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.tar"
    if shard.exists():
        return shard
    free = shutil.disk_usage(folder).free
    if free < state.st_size:
        raise ValueError(
            f"{path}: unpacking needs about {state.st_size >> 20} MiB in {folder}, which has {free >> 20} MiB free; "
            "set BEIT_FAST_CACHE to a larger disk"
        )
    partial = shard.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
                for number, (name, data, label) in enumerate(_rows(path)):
                    _add(archive, f"{number:09d}/{name}", data)
                    if label is not None:
                        _add(archive, f"{number:09d}/{os.path.splitext(name)[0]}.cls", str(label).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, shard)
    finally:
        partial.unlink(missing_ok=True)
    return shard


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _rows(path: Path) -> Iterator[tuple[str, bytes, int | None]]:
    """(file name, encoded image, label) of every row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading parquet files needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        image, label = _columns(table.schema_arrow, path)
        columns = [image] if label is None else [image, label]
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            labels = [None] * len(batch) if label is None else batch.column(label).to_pylist()
            for number, value in enumerate(batch.column(image).to_pylist()):
                data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                if data is None:
                    raise ValueError(f"{path}: a row of column {image!r} holds no bytes ({name or 'no path'})")
                name = os.path.basename(name or "") or "image"
                yield name if is_image(name) else name + _suffix(data), data, labels[number]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); fetch it again") from None


def _columns(schema: Any, path: Path) -> tuple[str, str | None]:
    """Names of the column of images and of that of labels, where there is one."""
    import pyarrow.types as types

    def holds_images(field: Any) -> bool:
        if types.is_struct(field.type):
            return any(field.type.field(i).name == "bytes" for i in range(field.type.num_fields))
        return bool(types.is_binary(field.type) or types.is_large_binary(field.type))

    images = [field.name for field in schema if holds_images(field)]
    if len(images) != 1:
        raise ValueError(f"{path}: {len(images)} columns hold images ({', '.join(images) or schema.names}); one must")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    labels = [field.name for field in schema if types.is_integer(field.type)]
    named = [name for name in labels if name in ("label", "labels", "cls", "fine_label")]
    classes = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
    chosen = classes or named
    if len(chosen) > 1:
        raise ValueError(f"{path}: columns {', '.join(chosen)} could all be the labels; keep one of them")
    return images[0], chosen[0] if chosen else None


def _suffix(data: bytes) -> str:
    """A suffix for a row without a name; the content decides how it is decoded."""
    kinds = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif",
             b"\x93NUMPY": ".npy"}  # fmt: skip
    suffix = next((suffix for start, suffix in kinds.items() if data.startswith(start)), ".jpg")
    assert suffix in IMAGE_SUFFIXES
    return suffix
