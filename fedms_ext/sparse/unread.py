"""`Unread`: a tensor that is made when its values are read, and `Maker`, which finds the module to put off in a forward pass."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map

# What can be asked of an unread tensor without its values: getters of attributes, and methods.
_KNOWN = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")}
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}


class Unread(Tensor):
    """A tensor whose values are made when the first operation reads them. Shape, dtype and device are known before."""

    _like: Tensor
    _make: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, make: Callable[[], Tensor]) -> Unread:
        """Return a tensor with the values of `make()` and the shape, dtype and device of `like`.

        It holds no memory of its own, so that code which reads memory without PyTorch's operators finds none.
        """
        unread = torch.empty_like(like, device="meta").as_subclass(Unread)
        unread._like, unread._make = like, make
        return unread

    def _read(self) -> Tensor:
        if not hasattr(self, "_value"):
            self._value = self._make()
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        known = func in _KNOWN
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map(
                lambda value: (value._like if known else value._read()) if isinstance(value, Unread) else value,
                (args, kwargs or {}))
            return func(*args, **kwargs)


class Maker:
    """Watches one forward pass for the module that makes the input of a model's first block, such as its embeddings."""

    def __init__(self) -> None:
        self.made: list[tuple[nn.Module, object]] = []
        here = threading.get_ident()        # other threads may run models at the same time

        def keep(module: nn.Module, _: object, out: object) -> None:
            if threading.get_ident() == here:
                self.made.append((module, out))
        self._hook = register_module_forward_hook(keep)

    def end(self) -> None:
        self._hook.remove()
        self.made = []

    def find(self, hidden: object) -> nn.Module | None:
        """Return the outermost module whose output is `hidden`, or None if it has no weights or they are trained.

        A module that ran several times is not returned, because its other outputs may be used elsewhere.
        """
        modules = [module for module, _ in self.made]
        makers = [module for module, out in self.made if out is hidden and modules.count(module) == 1]
        weights = list(makers[-1].parameters()) if makers else []
        return makers[-1] if weights and not any(weight.requires_grad for weight in weights) else None
