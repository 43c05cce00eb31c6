"""Attention with a learned additive bias, and the gradient of queries, keys, values and bias."""
