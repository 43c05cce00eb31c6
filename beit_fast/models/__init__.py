"""BEiT models: configurations, the backbone with its classifier, masked image modelling, position resizing."""

from .beit import Beit
from .configs import BeitConfig
from .create import create_model, list_models
from .key_names import convert_state_dict
from .mim import BeitForMaskedImageModeling, MaskedImageModelingOutput
from .resize import resize_position_embedding, resize_relative_position_bias_table

__all__ = [
    "Beit",
    "BeitConfig",
    "BeitForMaskedImageModeling",
    "MaskedImageModelingOutput",
    "convert_state_dict",
    "create_model",
    "list_models",
    "resize_position_embedding",
    "resize_relative_position_bias_table",
]
