"""The loss of masked image modelling: masked rows, LayerNorm, linear head, cross entropy, accuracy."""
