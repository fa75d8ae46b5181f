"""The functions `expert_linear` and `attention`: PyTorch operators, autograd, checks of arguments, and shortcuts past the dispatcher."""

from .attention import attention
from .expert_linear import expert_linear

__all__ = ["attention", "expert_linear"]
