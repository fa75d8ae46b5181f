"""`FrozenLinear`: a linear layer whose weight is frozen and may be quantized."""
from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedms_ext.nn.linear import is_conv1d, is_transposed
from fedms_ext.nn.quantized_weight import QuantizedWeight
from fedms_ext.operators import expert_linear


class FrozenLinear(nn.Linear):
    """`y = x W^T + b`, where W is a `QuantizedWeight`.

    On the CPU each row of x is quantized too, and the integer sums of products are exact. On other devices the weight is
    expanded to the dtype of x. The gradient of x is computed with a transposed weight that is quantized separately; see
    `QuantizedWeight.for_dx`.

    `take` turns an existing layer into a `FrozenLinear` by changing its class, so the layer stays the same object: its
    hooks, its other attributes and all references to it remain valid. Reading `weight` expands the quantized weight, in
    the dtype of the original one, at every read; it is not a parameter and not in the `state_dict`.

    Args:
        frozen: The weight (N, K).
        bias: (N,) or None. It gets no gradient.
    """

    frozen: QuantizedWeight | None

    def __init__(self, frozen: QuantizedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = frozen.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.plain: type[nn.Module] = nn.Linear
        self.frozen = frozen

    @classmethod
    def take(cls, layer: Any) -> Any:
        """Turn a linear layer (see `nn.linear.obstacle`) into one of this class in place, and return it."""
        if not isinstance(layer, FrozenLinear):
            layer.plain = type(layer)
            if is_conv1d(layer):
                layer.in_features, layer.out_features = layer.weight.shape
            layer.frozen = None
        layer.__class__ = cls
        return layer

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        there = prefix + "frozen.q" in state_dict
        if there and self.frozen is None:
            warnings.warn("weights that are in full precision here are quantized in the state dict, so they are not loaded; before "
                          "load_state_dict call fedms_ext.quantize(model, KIND) with the format that was saved", stacklevel=2)
        elif self.frozen is not None and not there and prefix + "weight" in state_dict:
            warnings.warn("weights that are quantized here are in full precision in the state dict, so they are not loaded; load them "
                          "into a model that is not quantized yet, or, if they are the weights that this one was made of, call "
                          "fedms_ext.dequantize(model, state_dict)", stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def leave(self) -> None:
        """Undo `take` in place. While the weight is quantized, the layer becomes a `FrozenLinear`."""
        if self.frozen is not None:
            self.__class__ = FrozenLinear
            return
        plain = self.plain
        del self.plain, self.frozen
        if not issubclass(plain, nn.Linear):
            del self.in_features, self.out_features
        self.__class__ = plain  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        frozen = self.__dict__.get("_modules", {}).get("frozen") if name == "weight" else None
        if frozen is None or "weight" in self._parameters:
            return super().__getattr__(name)
        return self._as_stored(frozen.dequantize().to(frozen.dtype))

    def _as_stored(self, matrix: Tensor) -> Tensor:
        """Convert a weight between (N, K) and the layout of the layer's original class: a Conv1D stores (K, N)."""
        return matrix.t() if is_transposed(self) else matrix

    def matrix(self) -> Tensor:
        """The weight as (N, K)."""
        weight: Tensor | None = self._parameters.get("weight")   # saves 1 us a call over self.weight
        if weight is None:
            weight = self.weight
        return weight if self.plain is nn.Linear else self._as_stored(weight)

    def freeze(self, frozen: QuantizedWeight) -> None:
        """Replace `weight` by a quantized weight (N, K); see `fedms_ext.quantize`."""
        del self.weight
        self.frozen = frozen

    def thaw(self, weight: Tensor) -> None:
        """Replace the quantized weight by `weight`, in the layout of the layer's original class; see
        `fedms_ext.dequantize`."""
        bias = self._parameters.pop("bias")  # the order of parameters is that of the state_dict
        self.frozen = None
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.register_parameter("bias", bias)   # by its name also where it is None, as nn.Linear does

    def forward(self, x: Tensor) -> Tensor:
        frozen: Any = self._modules.get("frozen")
        return F.linear(x, self.matrix(), self.bias) if frozen is None else expert_linear(x, frozen, self.bias)
