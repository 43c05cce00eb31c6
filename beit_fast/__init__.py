"""BEiT (BERT pre-training of image transformers, arXiv 2106.08254) on PyTorch, engineered for speed."""

from .integrations import accelerate, restore
from .kernels import use_backend
from .models import (
    Beit,
    BeitConfig,
    BeitForMaskedImageModeling,
    create_model,
    list_models,
)
from .version import __version__

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
