"""BEiT (BERT pre-training of image transformers, arXiv 2106.08254) on PyTorch, engineered for speed."""

from beit_fast.integrations import accelerate, restore
from beit_fast.kernels import use_backend
from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, create_model, list_models
from beit_fast.version import __version__

__all__ = [
    "Beit",
    "BeitConfig",
    "BeitForMaskedImageModeling",
    "__version__",
    "accelerate",
    "create_model",
    "list_models",
    "restore",
    "use_backend",
]
