"""`color_jitter` in plain torch is its definition; the loaders of a CPU have one pass with threads instead.

That pass is `beit_fast._C.transform_views`.
"""

from beit_fast.kernels.color_jitter.reference import color_jitter

__all__ = ["color_jitter"]
