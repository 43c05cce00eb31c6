"""The modules of a BEiT backbone; each calls one fused op of `beit_fast.kernels`."""

from .attention import Attention
from .block import Block
from .drop_path import DropPathRates, drop_path_scales
from .mlp import Mlp
from .patch_embed import PatchEmbed
from .relative_position_bias import RelativePositionBias

__all__ = ["Attention", "Block", "DropPathRates", "Mlp", "PatchEmbed", "RelativePositionBias", "drop_path_scales"]
