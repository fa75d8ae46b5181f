"""`FrozenLinear`: an `nn.Linear` whose weight is frozen and quantised."""
from __future__ import annotations

from torch import Tensor, nn

from fedms_ext.frozen_ops import frozen_linear
from fedms_ext.nn.quantised_weight import QuantisedWeight


class FrozenLinear(nn.Linear):
    """`y = x W^T + b` with a `QuantisedWeight` in the place of W; `weight` is None.

    On the CPU x is quantised too, row by row, and the sums of products are exact. Elsewhere the weight is
    expanded to x's dtype. The gradient of x comes from a weight that is quantised apart (`transposed`).

    Args:
        frozen: the weight (N, K).
        bias: (N,) or None. It gets no gradient.
    """

    def __init__(self, frozen: QuantisedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = frozen.shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.frozen, self.bias)
