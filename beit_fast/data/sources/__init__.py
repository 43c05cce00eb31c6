"""Where images come from, one file a form: folders, tar shards, zip archives, parquet, arrays, datasets, CIFAR-100."""

from beit_fast.data.sources.archives import ZipSource
from beit_fast.data.sources.arrays import ArraySource, DatasetSource
from beit_fast.data.sources.folders import FolderSource
from beit_fast.data.sources.parquet import ParquetSource
from beit_fast.data.sources.paths import open_source
from beit_fast.data.sources.shards import TarSource
from beit_fast.data.sources.source import IMAGE_SUFFIXES, ImageSource, fingerprint

__all__ = [
    "IMAGE_SUFFIXES",
    "ArraySource",
    "DatasetSource",
    "FolderSource",
    "ImageSource",
    "ParquetSource",
    "TarSource",
    "ZipSource",
    "fingerprint",
    "open_source",
]
