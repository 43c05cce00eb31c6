"""Images in, pre-training batches out: sources, screening, sampling, views. DALI is imported where it is first used."""

from beit_fast.data.loader import Request
from beit_fast.data.pretraining import PretrainBatch, PretrainLoader
from beit_fast.data.sampling import BlockwiseMasking, CropSampler, Views, epoch_order, sample_keys
from beit_fast.data.screening import BadImages, Header, Rejection, TooManyBadImages, screen
from beit_fast.data.sources import ArraySource, FolderSource, ImageSource, TarSource, fingerprint, open_source

__all__ = [
    "ArraySource",
    "BadImages",
    "BlockwiseMasking",
    "CropSampler",
    "FolderSource",
    "Header",
    "ImageSource",
    "PretrainBatch",
    "PretrainLoader",
    "Rejection",
    "Request",
    "TarSource",
    "TooManyBadImages",
    "Views",
    "epoch_order",
    "fingerprint",
    "open_source",
    "sample_keys",
    "screen",
]
