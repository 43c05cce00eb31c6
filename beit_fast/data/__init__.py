"""Images in, pre-training batches out: sources, screening, sampling, views. DALI is imported where it is first used."""

from beit_fast.data.sources import ArraySource, FolderSource, ImageSource, TarSource, fingerprint, open_source

__all__ = ["ArraySource", "FolderSource", "ImageSource", "TarSource", "fingerprint", "open_source"]
