"""The modules of a BEiT backbone; each calls one fused op of `beit_fast.kernels`."""

from beit_fast.nn.attention import Attention
from beit_fast.nn.block import Block
from beit_fast.nn.drop_path import DropPathRates, drop_path_scales
from beit_fast.nn.mlp import Mlp
from beit_fast.nn.patch_embed import PatchEmbed
from beit_fast.nn.relative_position_bias import RelativePositionBias

__all__ = ["Attention", "Block", "DropPathRates", "Mlp", "PatchEmbed", "RelativePositionBias", "drop_path_scales"]
