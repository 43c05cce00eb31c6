"""Bias and exact GELU, with the bias gradient in the backward pass."""
