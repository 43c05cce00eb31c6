"""Where images come from, one file a form: folders, tar shards, zip archives, parquet, arrays, datasets, CIFAR-100."""

from beit_fast.data.sources.archives import ZipSource
from beit_fast.data.sources.arrays import ArraySource, DatasetSource
from beit_fast.data.sources.contents import IMAGE_SUFFIXES, Contents
from beit_fast.data.sources.folders import FolderSource
from beit_fast.data.sources.parquet import ParquetSource
from beit_fast.data.sources.paths import VALIDATION_FOLDERS, local_path, open_source, open_training_source
from beit_fast.data.sources.shards import TarSource
from beit_fast.data.sources.source import ImageSource, default_cache_dir, fingerprint, read_file

__all__ = [
    "IMAGE_SUFFIXES", "VALIDATION_FOLDERS", "ArraySource", "Contents", "DatasetSource", "FolderSource", "ImageSource",
    "ParquetSource", "TarSource", "ZipSource", "default_cache_dir", "fingerprint", "local_path", "open_source",
    "open_training_source", "read_file",
]  # fmt: skip
