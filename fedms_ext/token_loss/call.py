"""What a call of the operator gives to a backend, and what it gets."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadCall(NamedTuple):
    """A frozen head (V, D).

    weight (V, D) floating; bias (V,) or None; quantized: (data, scale, kind, group) of a `QuantizedWeight` of the same weight,
    which the logits are computed from, or None; scale and cap: z = cap * tanh(scale * logits / cap), without the tanh where
    cap is None.
    """

    weight: Tensor
    bias: Tensor | None
    quantized: tuple[Tensor, Tensor, str, int] | None
    scale: float
    cap: float | None


class Result(NamedTuple):
    """log_p (n,), confidence (n, 2), best (n,) int64, and the gradient (n, D) of log_p by hidden, or (0, D)."""

    log_p: Tensor
    confidence: Tensor
    best: Tensor
    gradient: Tensor


def empty_result(hidden: Tensor, needs_gradient: bool) -> Result:
    """Return a result whose tensors are allocated and not yet written; hidden: (n, d)."""
    n, d = hidden.shape
    return Result(hidden.new_empty(n), hidden.new_empty(n, 2), hidden.new_empty(n, dtype=torch.int64),
                  hidden.new_empty(n if needs_gradient else 0, d))
