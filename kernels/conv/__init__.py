"""What an encoder of convolutions needs beside the convolutions: passes over activations, and an exact arg-max."""

from beit_fast.kernels.conv.op import ExactHead, bias_relu, conv_relu, exact_argmax, pixel_conv, pool_bias_relu

__all__ = ["ExactHead", "bias_relu", "conv_relu", "exact_argmax", "pixel_conv", "pool_bias_relu"]
