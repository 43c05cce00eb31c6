"""BEiT models: configurations, the backbone with its classifier, masked image modelling, position resizing."""

from beit_fast.models.beit import Beit
from beit_fast.models.checkpoints import LoadReport, load_checkpoint
from beit_fast.models.configs import BeitConfig
from beit_fast.models.create import create_model, list_models
from beit_fast.models.features import BeitFeatures
from beit_fast.models.key_names import convert_state_dict
from beit_fast.models.mim import BeitForMaskedImageModeling, MaskedImageModelingOutput
from beit_fast.models.reading import CheckpointError
from beit_fast.models.resize import resize_position_embedding, resize_relative_position_bias_table
from beit_fast.models.segmentation import BeitForSemanticSegmentation, SegmentationConfig

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
