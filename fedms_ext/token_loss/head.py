"""`FrozenHead`: the last, frozen layer of a language model."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedms_ext.nn.quantized_weight import QuantizedWeight
from fedms_ext.operators import expert_linear
from fedms_ext.quantization.formats import EIGHT_BITS


class FrozenHead(nn.Module):
    """Logits z = cap * tanh(scale * (hidden weight^T + bias) / cap) over V tokens; without a cap the inner part alone.

    The weight may be one that another module owns (a tied embedding): it is neither copied nor registered here.

    Args:
        weight: (V, D), floating.
        bias: (V,) or None.
        scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        cap: the soft cap of Gemma 2, above 0; None: no cap.
        dtype: "fp32": the logits come from `weight`; "int8" or "int8_rotated": from a copy in that format (see
            `QuantizedWeight`), the gradient still from `weight`, which may be rounded to bfloat16 (see `token_log_prob`).

    Raises:
        ValueError: for a weight that is no matrix, a bias of another size, a scale or cap that is not finite and above 0, or
            another dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, cap: float | None = None,
                 dtype: str = "fp32") -> None:
        super().__init__()
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"the weight is {weight.dtype} of shape {tuple(weight.shape)}, expected floating (V, D)")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias has the shape {tuple(bias.shape)}, expected ({len(weight)},)")
        for name, value in (("scale", scale), ("cap", cap)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected a finite number above 0")
        if dtype != "fp32" and dtype not in EIGHT_BITS:
            raise ValueError(f"dtype is {dtype!r}, expected fp32, {' or '.join(EIGHT_BITS)}")
        self._shared = (weight, bias)
        self.scale, self.cap = float(scale), cap
        self.quantized = QuantizedWeight(weight, dtype) if dtype != "fp32" else None

    def _apply(self, fn, recurse: bool = True) -> FrozenHead:
        super()._apply(fn, recurse)
        for tensor in self._shared:     # in place, so that a tied weight stays tied
            if tensor is not None:
                tensor.data = fn(tensor.data)
        return self

    @property
    def weight(self) -> Tensor:
        return self._shared[0]

    @property
    def bias(self) -> Tensor | None:
        return self._shared[1]

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), without a gradient: for generation. For a loss use `token_log_prob`."""
        bias = self.bias
        if self.quantized is None:
            logits = F.linear(hidden, self.weight, bias)
        else:
            logits = expert_linear(hidden, self.quantized, bias)
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
