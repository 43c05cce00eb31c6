"""Images in, pre-training batches out: sources, screening, sampling, views. DALI is imported where it is first used."""

from beit_fast.data.pretrain_views import PretrainBatch, PretrainViews, Request
from beit_fast.data.sampling import BlockwiseMasking, Views, ViewSampling, epoch_order, sample_keys
from beit_fast.data.screening import BadImages, Header, Rejection, TooManyBadImages, screen
from beit_fast.data.sources import ArraySource, FolderSource, ImageSource, TarSource, fingerprint, open_source

__all__ = [
    "ArraySource",
    "BadImages",
    "BlockwiseMasking",
    "FolderSource",
    "Header",
    "ImageSource",
    "PretrainBatch",
    "PretrainViews",
    "Rejection",
    "Request",
    "TarSource",
    "TooManyBadImages",
    "ViewSampling",
    "Views",
    "epoch_order",
    "fingerprint",
    "open_source",
    "sample_keys",
    "screen",
]
