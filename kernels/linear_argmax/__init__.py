"""The arg-max of a linear layer, as the nearest code of a codebook is; on a GPU the logits never exist."""

from beit_fast.kernels.linear_argmax.op import linear_argmax

__all__ = ["linear_argmax"]
