"""Colour jitter, flip and normalisation of resized views, from bytes to the model's input in one pass."""
