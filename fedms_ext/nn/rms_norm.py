"""`use_rms_norm`: let the RMS norms of a model take one C++ call where nothing is differentiated, as in decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedms_ext import _C
from fedms_ext.backends.device import ON_GPU
from fedms_ext.operators.dispatch import is_observed


class RMSNorm(nn.Module):
    """An RMS norm of another library, `y = weight * x / sqrt(mean(x^2) + epsilon)`, that computes what it did before.

    Where no gradient is needed, on a CPU in float32, a C++ kernel replaces six operators of PyTorch, and the rounding changes: the
    weights of a token's layers push PyTorch's code and data out of the caches, so that each operator costs several times what it
    does in a loop. `use_rms_norm` turns an existing norm into this class by changing its class, so it stays the same object with
    the same `state_dict`.

    Attributes:
        plain: The class that it was.
        epsilon: The number below the root.
    """

    plain: type[nn.Module]
    epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self._parameters["weight"]
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not needs_gradient and not getattr(x, ON_GPU) and not is_observed():
            y = _C.rms_norm(x, weight, self.epsilon)
            if y is not None:
                return y
        return self.plain.forward(self, x)


def use_rms_norm(model: nn.Module) -> int:
    """Turn the RMS norms of a model into `RMSNorm` in place, and return how many were turned.

    A norm is turned if its class is named `...RMSNorm`, if it has one parameter, `weight`, and a number `variance_epsilon` or `eps`,
    and if it computes the formula above, which it is tried for. Others, such as those of Gemma, whose factor is `1 + weight`, stay.
    """
    turned = 0
    module: Any
    for module in model.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and isinstance(epsilon, float) and _computes(module, epsilon):
            module.plain, module.epsilon = type(module), epsilon
            module.__class__ = RMSNorm
            turned += 1
    return turned


@torch.no_grad()
def _computes(norm: nn.Module, epsilon: float) -> bool:
    weight = norm._parameters.get("weight")
    if isinstance(norm, RMSNorm) or weight is None or len(norm._parameters) > 1 or weight.is_meta or not weight.is_floating_point():
        return False
    x = torch.linspace(-1, 2, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
    wanted = weight * (x.float() * (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(x.dtype)
    return torch.allclose(norm(x).to(wanted.dtype), wanted, rtol=1e-2 if x.dtype.itemsize < 4 else 1e-5)
