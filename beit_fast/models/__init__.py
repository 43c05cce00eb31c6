"""BEiT models: configurations, the backbone with its classifier, masked image modelling, position resizing."""

from .beit import Beit
from .checkpoints import LoadReport, load_checkpoint
from .configs import BeitConfig
from .create import create_model, list_models
from .features import BeitFeatures
from .key_names import convert_state_dict
from .mim import BeitForMaskedImageModeling, MaskedImageModelingOutput
from .reading import CheckpointError
from .resize import resize_position_embedding, resize_relative_position_bias_table
from .segmentation import BeitForSemanticSegmentation, SegmentationConfig

__all__ = [
    "Beit",
    "BeitConfig",
    "BeitFeatures",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "CheckpointError",
    "LoadReport",
    "MaskedImageModelingOutput",
    "SegmentationConfig",
    "convert_state_dict",
    "create_model",
    "list_models",
    "load_checkpoint",
    "resize_position_embedding",
    "resize_relative_position_bias_table",
]
