"""Frozen weights in 16, 8 and 4 bits: the formats, and the quantization of a model's layers."""
