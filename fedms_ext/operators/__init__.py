"""The PyTorch operator `expert_linear`: schema, fake kernels, autograd, checks of its arguments, and the way past the dispatcher."""

from .attention import attention
from .expert_linear import expert_linear

__all__ = ["attention", "expert_linear"]
