"""Operands of a Linear layer rounded to int8 as the kernels do it, or otherwise, and back in float32."""

from __future__ import annotations

from torch import Tensor

from fedms_ext.reference import quantize_rows, quantize_weight, rotate


def rounded_weight(w: Tensor) -> Tensor:
    """Return a weight (N, K) rounded with one scale for each row."""
    q, scale = quantize_weight(w)
    return q * scale.unsqueeze(1)


def rounded_rows(x: Tensor, steps: int = 255) -> Tensor:
    """Return inputs (..., K) rounded with one scale for each row, in so many steps."""
    q, scale = quantize_rows(x, steps)
    return q * scale


def rounded_groups(x: Tensor, group: int) -> Tensor:
    """Return inputs (..., K) rounded with one scale for so many values of a row; `group` divides K."""
    return rounded_rows(x.unflatten(-1, (-1, group))).flatten(-2)


def rotated(x: Tensor, block: int) -> Tensor:
    """Return x (..., K), blocks of 4, 16 or 64 columns multiplied by a Hadamard matrix; with blocks of 1, x itself. Applied twice, it
    gives x again."""
    return rotate(x.unflatten(-1, (-1, block))).flatten(-2)
