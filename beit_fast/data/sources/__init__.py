"""Where images come from, one file a form: folders, tar shards, arrays, CIFAR-100."""

from beit_fast.data.sources.arrays import ArraySource
from beit_fast.data.sources.folders import FolderSource
from beit_fast.data.sources.paths import open_source
from beit_fast.data.sources.shards import TarSource
from beit_fast.data.sources.source import IMAGE_SUFFIXES, ImageSource, fingerprint

__all__ = ["IMAGE_SUFFIXES", "ArraySource", "FolderSource", "ImageSource", "TarSource", "fingerprint", "open_source"]
