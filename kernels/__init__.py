"""The fused operations of BEiT, one folder each: the definition, the dispatch, the Triton kernels.

Installed as `beit_fast.kernels`; every operation runs on CPU (plain torch) and on a GPU (Triton), with equal results.
"""

if __name__ == "beit_fast.kernels":
    from beit_fast.kernels.attention.op import Bias, biased_attention, packed_attention, prepare_bias
    from beit_fast.kernels.backend import use_backend
    from beit_fast.kernels.color_jitter.op import color_jitter
    from beit_fast.kernels.gelu.op import bias_gelu
    from beit_fast.kernels.matmul import linear
    from beit_fast.kernels.mim_loss.op import masked_cross_entropy
    from beit_fast.kernels.position_bias.op import relative_position_bias
    from beit_fast.kernels.position_bias.reference import relative_position_index
    from beit_fast.kernels.residual_norm.op import residual_add, residual_layer_norm
else:
    # Seen from the root of a clone this folder takes the name of a package of Hugging Face's, which transformers looks
    # for by importing it: that must succeed. But nothing may be had here, or the ops would be registered once more.
    __path__ = []

    def __getattr__(name: str) -> object:
        kind = AttributeError if name.startswith("__") else ImportError
        raise kind(f"this folder is beit_fast.kernels: write `import beit_fast.kernels`, not `import kernels` ({name})")


__all__ = [
    "Bias",
    "bias_gelu",
    "biased_attention",
    "color_jitter",
    "linear",
    "masked_cross_entropy",
    "packed_attention",
    "prepare_bias",
    "relative_position_bias",
    "relative_position_index",
    "residual_add",
    "residual_layer_norm",
    "use_backend",
]
