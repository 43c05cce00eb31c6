"""Residual connection and LayerNorm in one pass: LayerScale, stochastic depth, sum, norm."""
