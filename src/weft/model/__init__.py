"""Decoder families, layers, kernels, zoo. torch lives here and above."""
